// The targets of the custom calls: which handlers serve them, and which kernel they belong to.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "buffers.h"
#include "core/devices.h"

#ifdef SYNTONIC_HOST
namespace syntonic {
struct NoStream {};
}  // namespace syntonic

// On the host there is no stream to ask XLA for.
template <>
struct xla::ffi::CtxDecoding<syntonic::NoStream> {
  using Type = syntonic::Stream;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*,
                                    DiagnosticEngine&) {
    return Type{};
  }
};
#endif

namespace syntonic {

#ifdef SYNTONIC_HOST
using StreamOfCall = NoStream;
#else
using StreamOfCall = ffi::PlatformStream<Stream>;
#endif

// What every execute handler is bound to before attributes of its own: the arrays, and what they
// are called. The handlers only launch, so XLA may record them into a command buffer (a CUDA
// graph).
inline auto execute() {
  return ffi::Ffi::BindExecute()
      .Ctx<StreamOfCall>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<std::string_view>("operands")
      .Attr<std::string_view>("results");
}

// The device of the call, by its number; one that is not known has none.
inline std::optional<int> current_device() {
#ifdef SYNTONIC_HOST
  return 0;
#else
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return std::nullopt;
  return device;
#endif
}

// The initialize stage loads the kernels onto the device of the call: a launch that is being
// recorded must not do that. It runs before each execution, on each device, so what was done for a
// device and a type is remembered.
template <Status (*load)(DType)>
ffi::Error load_for(const ffi::AnyBuffer& data) {
  static DeviceSet loaded[4];  // by type
  // A wrong dtype is for the execute handler to report.
  const std::optional<DType> dtype = dtype_of(data);
  if (!dtype) return ffi::Error::Success();
  const std::optional<int> device = current_device();
  DeviceSet& devices = loaded[static_cast<int>(*dtype)];
  if (device && devices.has(*device)) return ffi::Error::Success();
  if (load(*dtype) != kSuccess) {
    return ffi::Error::Internal(std::string("the kernels for ") + name_of(*dtype) +
                                " could not be loaded");
  }
  if (device) devices.add(*device);
  return ffi::Error::Success();
}

template <Status (*load)(DType)>
ffi::Error load_for_operand(ffi::AnyBuffer data, ffi::RemainingArgs, ffi::RemainingRets) {
  return load_for<load>(data);
}

template <Status (*load)(DType)>
ffi::Error load_for_result(ffi::RemainingArgs, ffi::Result<ffi::AnyBuffer> data,
                           ffi::RemainingRets) {
  return load_for<load>(*data);
}

inline auto initialize_by_operand() {
  return ffi::Ffi::BindInitialize().Arg<ffi::AnyBuffer>().RemainingArgs().RemainingRets();
}

inline auto initialize_by_result() {
  return ffi::Ffi::BindInitialize().RemainingArgs().Ret<ffi::AnyBuffer>().RemainingRets();
}

struct Target {
  const char* name;
  XLA_FFI_Handler* execute;
  XLA_FFI_Handler* initialize;
};

// The targets of one kernel, by its stem.
struct Kernel {
  std::string stem;
  std::vector<Target> targets;
};

// All that are linked in. The file of handlers of each adds its own when it is loaded.
inline std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}

struct Registration {
  Registration(const char* stem, std::vector<Target> targets) {
    kernels().push_back({stem, std::move(targets)});
  }
};

}  // namespace syntonic
