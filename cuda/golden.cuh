// The golden ratio, correctly rounded to the accumulation type.
#pragma once

namespace syntonic {

template <class A>
constexpr A kPhi = A(1.6180339887498948482L);

}  // namespace syntonic
