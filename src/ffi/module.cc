// The extension module: hands the targets to Python, which registers them with XLA.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <sstream>

#include "targets.h"

namespace nb = nanobind;

namespace {

nb::dict registrations() {
  nb::dict targets;
  for (const syntonic::Kernel& kernel : syntonic::kernels()) {
    for (const syntonic::Target& target : kernel.targets) {
      nb::dict stages;
      stages["execute"] = nb::capsule(reinterpret_cast<void*>(target.execute));
      stages["initialize"] = nb::capsule(reinterpret_cast<void*>(target.initialize));
      targets[target.name] = stages;
    }
  }
  return targets;
}

std::vector<std::string> kernels() {
  std::vector<std::string> stems;
  for (const syntonic::Kernel& kernel : syntonic::kernels()) stems.push_back(kernel.stem);
  std::sort(stems.begin(), stems.end());
  return stems;
}

// A comma-separated list, as CMake knows it.
std::vector<std::string> architectures() {
  std::vector<std::string> names;
  std::istringstream list(SYNTONIC_ARCHITECTURES);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

}  // namespace

NB_MODULE(SYNTONIC_MODULE, module) {
  module.doc() = "The CUDA kernels of syntonic-jax as XLA custom calls.";
  module.def("registrations", &registrations, "Targets: {name: {stage: capsule}}.");
  module.def("kernels", &kernels, "Stems of the kernels.");
  module.def(
      "ffi_api_version", [] { return std::make_pair(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "The version of XLA's FFI that the handlers were compiled for.");
  module.def("architectures", &architectures, "What the kernels were compiled for.");
}
