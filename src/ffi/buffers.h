// From XLA's buffers to the plain types of the launchers. The handlers trust nothing: a lowering
// with a mistake in it must end in an error that names the array, never in a stray memory access.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <ostream>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>

#include "core/types.h"
#include "xla/ffi/api/ffi.h"

// Tests build the handlers once more with a spare element at the front of every array (see Call).
#ifndef SYNTONIC_SPARE_ELEMENTS
#define SYNTONIC_SPARE_ELEMENTS 0
#endif

namespace syntonic {

namespace ffi = xla::ffi;

using Dims = ffi::AnyBuffer::Dimensions;

inline const char* name_of(DType dtype) {
  constexpr const char* names[] = {"float16", "bfloat16", "float32", "float64"};
  return names[static_cast<int>(dtype)];
}

inline std::optional<DType> dtype_of(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::F16:
      return DType::f16;
    case ffi::BF16:
      return DType::bf16;
    case ffi::F32:
      return DType::f32;
    case ffi::F64:
      return DType::f64;
    default:
      return std::nullopt;
  }
}

inline std::ostream& operator<<(std::ostream& out, Dims dims) {
  out << "(";
  for (size_t i = 0; i < dims.size(); ++i) out << (i ? ", " : "") << dims[i];
  return out << (dims.size() == 1 ? ",)" : ")");
}

// One operand or result. A default-constructed one stands for an array that the call does not have.
struct Array {
  const char* name = nullptr;
  DType dtype = DType::f32;
  Dims dims;
  int64_t count = 0;  // elements
  void* data = nullptr;

  bool present() const { return name != nullptr; }
};

// What the operands, or the results, of a call are called, in their order: the attributes
// `operands` and `results`, words with a space between them.
class Names {
 public:
  Names(std::string_view text) : text_(text) {}  // NOLINT: the attribute itself

  size_t count() const {
    size_t words = text_.empty() ? 0 : 1;
    for (const char c : text_) words += c == ' ';
    return words;
  }

  // The place of a name.
  std::optional<size_t> find(std::string_view name) const {
    size_t place = 0;
    for (std::string_view rest = text_; !rest.empty(); ++place) {
      if (first_of(rest) == name) return place;
      drop_first(rest);
    }
    return std::nullopt;
  }

  std::string_view at(size_t place) const {
    std::string_view rest = text_;
    for (; place > 0; --place) drop_first(rest);
    return first_of(rest);
  }

 private:
  static std::string_view first_of(std::string_view rest) { return rest.substr(0, rest.find(' ')); }
  static void drop_first(std::string_view& rest) {
    rest.remove_prefix(std::min(rest.size(), first_of(rest).size() + 1));
  }

  std::string_view text_;
};

// Reads the operands and results of one call by their names. The first thing found wrong becomes
// the error, and launch() then does not launch.
class Call {
 public:
  Call(const char* name, ffi::RemainingArgs operands, ffi::RemainingRets results,
       Names operand_names, Names result_names)
      : name_(name),
        operands_(operands),
        results_(results),
        operand_names_(operand_names),
        result_names_(result_names) {
    require(operand_names.count() == operands.size(), "names ", operand_names.count(),
            " operands, got ", operands.size());
    require(result_names.count() == results.size(), "names ", result_names.count(),
            " results, got ", results.size());
  }

  bool has_operand(const char* name) const { return operand_names_.find(name).has_value(); }
  bool has_result(const char* name) const { return result_names_.find(name).has_value(); }

  Array operand(const char* name) {
    const std::optional<ffi::AnyBuffer> buffer = buffer_of_operand(name);
    return buffer ? floats(name, *buffer) : Array{};
  }

  Array result(const char* name) {
    const std::optional<ffi::AnyBuffer> buffer = buffer_of_result(name);
    return buffer ? floats(name, *buffer) : Array{};
  }

  // Those that a call may be without.
  Array optional_operand(const char* name) { return has_operand(name) ? operand(name) : Array{}; }
  Array optional_result(const char* name) { return has_result(name) ? result(name) : Array{}; }

  // Of int32; its dtype says no more than the size of an element.
  Array integer_result(const char* name) {
    const std::optional<ffi::AnyBuffer> buffer = buffer_of_result(name);
    if (!buffer) return {};
    require(buffer->element_type() == ffi::S32, name, " must be int32");
    return array(name, *buffer, DType::f32, sizeof(int32_t));
  }

  // An operand of one of the types that numbers are not: truth values, labels. Its dtype means
  // nothing.
  Array operand_of(ffi::DataType type, const char* type_name, int item_size, const char* name) {
    const std::optional<ffi::AnyBuffer> buffer = buffer_of_operand(name);
    if (!buffer) return Array{};
    require(buffer->element_type() == type, name, " must be ", type_name);
    return array(name, *buffer, DType::f32, item_size);
  }

  template <typename... Parts>
  void require(bool holds, const Parts&... message) {
    if (holds || error_.failure()) return;
    std::ostringstream out;
    out << name_ << ": ";
    (out << ... << message);
    error_ = ffi::Error::InvalidArgument(out.str());
  }

  void in_range(const char* attribute, int32_t value, int32_t least, int32_t most) {
    require(value >= least && value <= most, "attribute ", attribute, " must lie in ", least, "..",
            most, ", got ", value);
  }

  void finite(const char* attribute, double value) {
    require(std::isfinite(value), "attribute ", attribute, " must be finite, got ", value);
  }

  void has_dtype(const Array& array, DType dtype) {
    if (!array.present()) return;
    require(array.dtype == dtype, array.name, " must be ", name_of(dtype), ", got ",
            name_of(array.dtype));
  }

  void has_shape_of(const Array& array, const Array& model) {
    if (!array.present()) return;
    require(array.dims == model.dims, array.name, " must have the shape ", model.dims, " of ",
            model.name, ", got ", array.dims);
  }

  void has_count(const Array& array, int64_t count) {
    if (!array.present()) return;
    require(array.count == count, array.name, " must have ", count, " elements, got ", array.dims);
  }

  int64_t width_of(const Array& data) {
    const size_t least_rank = 1 + SYNTONIC_SPARE_ELEMENTS;
    require(data.dims.size() >= least_rank, data.name, " must have rows, got ", data.dims);
    if (error_.failure()) return 1;
    require(data.dims.back() > 0, data.name, " must have rows of at least one element, got ",
            data.dims);
    return error_.failure() ? 1 : data.dims.back();
  }

  // How many rows of `width` elements the array has.
  int64_t rows_of(const Array& array, int64_t width) {
    const int64_t found = width_of(array);
    require(found == width, array.name, " must have rows of ", width, " elements, got ",
            array.dims);
    return array.count / width;
  }

  // `data` in as many groups as the parameters have rows, 1 without parameters.
  Rows rows(const Array& data, std::initializer_list<Array> parameters) {
    const int64_t width = width_of(data);
    const int64_t total = data.count / width;
    std::optional<int64_t> groups;
    for (const Array& parameter : parameters) {
      if (!parameter.present()) continue;
      has_dtype(parameter, accumulation(data.dtype));
      const int64_t found = rows_of(parameter, width);
      require(divides(found, total), parameter.name, " has ", found,
              " rows, which do not divide the ", total, " rows of ", data.name);
      require(found == groups.value_or(found), parameter.name, " must have ", groups.value_or(0),
              " rows, got ", found);
      groups = found;
    }
    if (error_.failure() || total == 0) return {1, 0, width};
    return {groups.value_or(1), total / groups.value_or(1), width};
  }

  // Of how many rows the parameter gradients are: consecutive stretches of the rows of the data.
  int64_t partials(const Array& d_scale, const Array& d_bias, const Rows& rows, const char* data) {
    has_shape_of(d_bias, d_scale.present() ? d_scale : d_bias);
    std::optional<int64_t> partials;
    for (const Array& array : {d_scale, d_bias}) {
      if (!array.present()) continue;
      const int64_t found = rows_of(array, rows.width);
      require(divides(found, rows.total()), array.name, " has ", found,
              " rows, which do not divide the ", rows.total(), " rows of ", data);
      require(divides(rows.groups, found), array.name, " has ", found,
              " rows, which is no multiple of the ", rows.groups, " rows of scale");
      partials = found;
    }
    return partials.value_or(rows.groups);
  }

  bool ok() const { return error_.success(); }

  static bool divides(int64_t parts, int64_t total) {
    return parts == 0 ? total == 0 : total % parts == 0;
  }

  // Runs `launcher` if every check has passed. Without data nothing is launched, and `sums` are 0.
  template <typename Launcher>
  ffi::Error launch(Stream stream, int64_t data_count, std::initializer_list<Array> sums,
                    const Launcher& launcher) {
    for (size_t i = 0; i < operands_.size() && ok(); ++i) {
      require(read_operands_ >> i & 1, "takes no operand ", operand_names_.at(i));
    }
    for (size_t i = 0; i < results_.size() && ok(); ++i) {
      require(read_results_ >> i & 1, "has no result ", result_names_.at(i));
    }
    if (error_.failure()) return error_;
    if (data_count > 0) return status(launcher());
    for (const Array& sum : sums) {
      if (sum.count == 0) continue;
      ffi::Error error = status(zero(stream, sum.data, sum.count * item_size(sum.dtype)));
      if (error.failure()) return error;
    }
    return ffi::Error::Success();
  }

 private:
  std::optional<ffi::AnyBuffer> buffer_of_operand(const char* name) {
    const std::optional<size_t> place = operand_names_.find(name);
    require(place.has_value(), "operand ", name, " is missing");
    if (!place || !ok()) return std::nullopt;
    read_operands_ |= uint64_t{1} << *place;
    return *operands_.get<ffi::AnyBuffer>(*place);
  }

  std::optional<ffi::AnyBuffer> buffer_of_result(const char* name) {
    const std::optional<size_t> place = result_names_.find(name);
    require(place.has_value(), "result ", name, " is missing");
    if (!place || !ok()) return std::nullopt;
    read_results_ |= uint64_t{1} << *place;
    return **results_.get<ffi::AnyBuffer>(*place);
  }

  Array floats(const char* name, const ffi::AnyBuffer& buffer) {
    const std::optional<DType> dtype = dtype_of(buffer);
    require(dtype.has_value(), name, " must be float16, bfloat16, float32 or float64");
    const DType found = dtype.value_or(DType::f32);
    return array(name, buffer, found, static_cast<int>(item_size(found)));
  }

  Array array(const char* name, const ffi::AnyBuffer& buffer, DType dtype, int item_size) {
    Array array{name, dtype, buffer.dimensions(), 1, buffer.untyped_data()};
    bool fits = true;
    for (size_t i = 0; i < array.dims.size(); ++i) {
      // Under test an array has one entry more along its first dimension, and the one that is
      // worked on begins at its second element: the only way to choose a pointer's alignment.
      const int64_t dim = array.dims[i] - (i == 0 ? SYNTONIC_SPARE_ELEMENTS : 0);
      fits = fits && dim >= 0 && !__builtin_mul_overflow(array.count, dim, &array.count);
    }
    fits = fits && array.count <= std::numeric_limits<int64_t>::max() / item_size;
    require(fits, array.name, " has an impossible shape ", array.dims);
    require(!fits || array.count == 0 || array.data != nullptr, array.name, " has no memory");
    array.data = static_cast<char*>(array.data) + SYNTONIC_SPARE_ELEMENTS * item_size;
    return array;
  }

#ifdef SYNTONIC_HOST
  ffi::Error status(Status status) const {
    if (status == kSuccess) return ffi::Error::Success();
    return ffi::Error::Internal(std::string(name_) + ": status " + std::to_string(status));
  }

  static Status zero(Stream, void* data, int64_t bytes) {
    std::fill_n(static_cast<char*>(data), bytes, 0);
    return kSuccess;
  }
#else
  ffi::Error status(Status status) const {
    if (status == kSuccess) return ffi::Error::Success();
    return ffi::Error::Internal(std::string(name_) + ": " + cudaGetErrorString(status));
  }

  static Status zero(Stream stream, void* data, int64_t bytes) {
    return cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream);
  }
#endif

  const char* name_;
  ffi::RemainingArgs operands_;
  ffi::RemainingRets results_;
  Names operand_names_;
  Names result_names_;
  uint64_t read_operands_ = 0;  // a bit for each
  uint64_t read_results_ = 0;
  ffi::Error error_;
};

}  // namespace syntonic
