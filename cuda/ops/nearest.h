// The nearest point a + b phi of the lattice with |a|, |b| <= precision, exactly, for one number.
// Plain C++ for the kernel and for the tests' double alike; docs/exact-arithmetic.md has the proof.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SYNTONIC_BOTH __host__ __device__
#define SYNTONIC_APART __noinline__
#else
#define SYNTONIC_BOTH
#define SYNTONIC_APART
#endif

namespace syntonic {

// The coefficients, as integers or as floats that hold them.
template <class T>
struct Point {
  T a;
  T b;
};

// phi^-m = (-1)^m (F(m+1) - F(m) phi): a step of the lattice with a positive length.
template <class A>
struct Step {
  A a;
  A length;
  A reach;  // a point is the nearest where x is nearer than this and the next one a step away
};

// Two ways to one end. Near the middle of the lattice only the bound of a matters, and a few
// multiplications lead to a point whose neighbour proves it the nearest. What they cannot decide
// (a tie, up to rounding; a number further out) is left to integers.
template <class A>
struct Lattice {
  int32_t precision;
  A bound;            // precision
  A middle;           // |x| below this: |b| <= precision follows from |a| <= precision
  A slope[2];         // r times these: how many of either start step
  Step<A> start[2];   // cross the whole range of a together
  Step<A> refine[3];  // every gap in the middle is one of these, from long to short
};

constexpr double kGolden = 1.6180339887498948482;
constexpr double kGoldenInverse = 0.6180339887498948482;

inline int64_t fibonacci(int n) {
  int64_t f = 0, g = 1;
  for (; n > 0; --n) {
    g += f;
    f = g - f;
  }
  return f;
}

template <class A>
Step<A> lattice_step(int m) {
  // r errs by less than 8 roundings of numbers below 1, and twice that is compared with a length.
  constexpr double kTolerance = sizeof(A) == 4 ? 0x1p-21 : 0x1p-49;
  const double a = static_cast<double>(fibonacci(m + 1)), length = std::pow(kGolden, -m);
  return {static_cast<A>(m % 2 ? -a : a), static_cast<A>(length),
          static_cast<A>((length - kTolerance) / 2)};
}

template <class A>
Lattice<A> lattice(int32_t precision) {
  Lattice<A> it = {};
  it.precision = precision;
  it.bound = static_cast<A>(precision);
  it.middle = static_cast<A>(precision / kGolden - 1);
  // F(q) < 2 precision + 1 <= F(q+1)
  int q = 3;
  while (fibonacci(q + 1) < 2 * int64_t{precision} + 1) ++q;
  for (int i = 0; i < 2; ++i) {
    it.start[i] = lattice_step<A>(q - 2 - i);
    it.slope[i] = static_cast<A>(-static_cast<double>(fibonacci(q - 2 + i)) / kGolden);
  }
  for (int i = 0; i < 3; ++i) it.refine[i] = lattice_step<A>(q - 3 + i);
  return it;
}

// phi in parts. A coefficient times the first is exact, and so is that plus the other coefficient,
// in float for precisions up to 2^10 and in double up to 2^20. The search needs two. The third is
// for values: where a and b phi nearly cancel, what two parts leave out is more than half a unit in
// the last place.
template <class A>
constexpr A kPhiHigh = sizeof(A) == 4 ? A(6627 / 4096.0) : A(1737350766 / 1073741824.0);
template <class A>
constexpr A kPhiLow = sizeof(A) == 4 ? A(0.00011406687489484821) : A(3.486010936269501e-10);
template <class A>
constexpr A kPhiRest = sizeof(A) == 4 ? A(-6.448718512311324e-13) : A(1.2162720957804577e-27);

// Within a unit in the last place: two of the sums round, each by half of one.
template <class A>
SYNTONIC_BOTH inline A lattice_value(Point<A> p) {
  const A value = std::fma(p.b, kPhiLow<A>, std::fma(p.b, kPhiHigh<A>, p.a));
  return std::fma(p.b, kPhiRest<A>, value);
}

// To the nearest integer; |x| below 2^22, or 2^51 for double.
template <class A>
SYNTONIC_BOTH inline A to_integer(A x) {
  constexpr A kShift = sizeof(A) == 4 ? A(12582912) : A(6755399441055744);
  return (x + kShift) - kShift;
}

// Whether `point` is the nearest is proved by its neighbour across x: the shortest step that stays
// in the lattice. False where x is too near to the middle between the two, and outside the middle
// of the lattice. Without a branch, as the elements of a pack are independent.
template <class A>
SYNTONIC_BOTH inline bool nearest_in_the_middle(const Lattice<A>& lattice, A x, Point<A>& point) {
  constexpr A kInverse = A(kGoldenInverse);
  // r = a + b phi - x, first of the point (0, b).
  const A b = to_integer(x * kInverse);
  A r = std::fma(b, kPhiLow<A>, std::fma(b, kPhiHigh<A>, -x));
  const A i = to_integer(r * lattice.slope[0]), j = to_integer(r * lattice.slope[1]);
  A a = std::fma(i, lattice.start[0].a, j * lattice.start[1].a);
  r = std::fma(j, lattice.start[1].length, std::fma(i, lattice.start[0].length, r));
  for (int k = 0; k < 3; ++k) {
    // Over the middle of the step it leads nearer.
    const A back = -std::copysign(A(1), r);
    const A next = std::fma(back, lattice.refine[k].a, a);
    const A moved = std::fma(back, lattice.refine[k].length, r);
    const bool take = (std::fabs(r) > lattice.refine[k].reach) & (std::fabs(next) <= lattice.bound);
    r = take ? moved : r;
    a = take ? next : a;
  }
  const A back = -std::copysign(A(1), r);
  A reach = lattice.refine[0].reach;
  for (int k = 1; k < 3; ++k) {
    const A across = std::fma(back, lattice.refine[k].a, a);
    reach = std::fabs(across) <= lattice.bound ? lattice.refine[k].reach : reach;
  }
  point = {a, to_integer((x - a) * kInverse)};
  return (std::fabs(x) < lattice.middle) & (std::fabs(a) <= lattice.bound) & (std::fabs(r) < reach);
}

// The sign of 2x - (a + b phi), x = whole + (part in units of 2^-32, 2^-64 and 2^-96). 192 bits
// behind the point decide for every float64 and every precision up to 2^20.
SYNTONIC_BOTH inline int sign_of_twice_minus(uint32_t whole, const uint32_t (&part)[3], int32_t a,
                                             int32_t b) {
  constexpr uint32_t kInverse[6] = {0xf3a27252u, 0x1082276bu, 0x5cedc834u,
                                    0xf39cc060u, 0x7f4a7c15u, 0x9e3779b9u};
  const uint32_t size = b < 0 ? 0u - static_cast<uint32_t>(b) : static_cast<uint32_t>(b);
  const uint32_t x[6] = {0, 0, 0, part[2], part[1], part[0]};
  // From the last limb up: twice x, less |b| / phi or more.
  uint64_t product = 0;
  uint32_t shifted_in = 0, any = 0;
  int64_t carry = 0;
  for (int i = 0; i < 6; ++i) {
    product = (product >> 32) + uint64_t{size} * kInverse[i];
    const int64_t term = static_cast<uint32_t>(product);
    carry += static_cast<int64_t>(x[i] << 1 | shifted_in) + (b < 0 ? term : -term);
    shifted_in = x[i] >> 31;
    any |= static_cast<uint32_t>(carry);
    carry >>= 32;
  }
  const int64_t term = static_cast<int64_t>(product >> 32);
  carry += 2 * int64_t{whole} + shifted_in + (b < 0 ? term : -term) - a - b;
  return carry < 0 ? -1 : carry > 0 || any != 0;
}

// By refining, level by level, the gap around the fractional part of x among those of multiples of
// phi: the same search as in syntonic_jax/ops/crystallize.py.
SYNTONIC_BOTH SYNTONIC_APART inline Point<int32_t> nearest_by_levels(int32_t p, double x) {
  // phi^-m in units of 2^-32, from m = 2 to the last that refines 1.24 x 2^20 numbers.
  static constexpr uint32_t kLengths[29] = {
      0x61c88647u, 0x3c6ef373u, 0x255992d4u, 0x1715609fu, 0x0e443234u, 0x08d12e6bu,
      0x057303c9u, 0x035e2aa3u, 0x0214d926u, 0x0149517du, 0x00cb87a8u, 0x007dc9d5u,
      0x004dbdd4u, 0x00300c01u, 0x001db1d2u, 0x00125a2fu, 0x000b57a3u, 0x0007028cu,
      0x00045517u, 0x0002ad75u, 0x0001a7a3u, 0x000105d2u, 0x0000a1d0u, 0x00006402u,
      0x00003dcfu, 0x00002633u, 0x0000179cu, 0x00000e97u, 0x00000905u};
  if (!std::isfinite(x)) return {0, 0};
  const int32_t sign = x < 0 ? -1 : 1;
  x = std::fabs(x);
  if (x > p * (1 + kGolden)) return {sign * p, sign * p};
  const auto whole = static_cast<int32_t>(x);
  double rest = x - whole;
  uint32_t part[3];
  for (uint32_t& word : part) {
    rest *= 0x1p32;
    word = static_cast<uint32_t>(rest);
    rest -= word;
  }
  // b with x - b phi within +-(precision + 1/2). The ends may be off: a point half a unit away is
  // never the nearest.
  const double half = p + 0.5;
  const auto last = static_cast<int32_t>(std::floor((x + half) * kGoldenInverse));
  const int32_t largest = last < p ? last : p;
  const int32_t count = largest - static_cast<int32_t>(std::ceil((x - half) * kGoldenInverse)) + 1;
  if (count <= 0) return {sign * p, sign * p};

  constexpr uint64_t kInverse = 0x9e3779b97f4a7c15u;
  const uint32_t target = static_cast<uint32_t>(largest * kInverse >> 32) - part[0];
  int32_t below = 0, above = 0;
  uint32_t under = target, over = ~target;  // distances
  int32_t step = 1, next = 2;
  for (int level = 0; step < count; ++level) {
    const uint32_t length = kLengths[level];
    const bool odd = level % 2;  // level 2 is the first
    const int32_t index = (odd ? below : above) + step;
    const uint32_t distance = odd ? under : over;
    if (index < count) {
      const bool beyond = distance >= length;
      (beyond == odd ? below : above) = index;
      (beyond == odd ? under : over) = beyond ? distance - length : length - distance;
    }
    next += step;
    step = next - step;
  }

  // The integer near x - b phi +- distance is a.
  const auto point = [&](int32_t b, double distance) {
    const auto a = static_cast<int32_t>(std::rint(x - b * kGolden + distance * 0x1p-32));
    return Point<int32_t>{a < -p ? -p : a > p ? p : a, b};
  };
  const Point<int32_t> upper = point(largest - below, under);
  const Point<int32_t> lower = point(largest - above, -static_cast<double>(over));
  const int nearer = sign_of_twice_minus(whole, part, upper.a + lower.a, upper.b + lower.b);
  // Equally near: b and -b, so that |a| decides.
  const bool take = nearer > 0 || (nearer == 0 && upper.a < lower.a);
  const Point<int32_t> nearest = take ? upper : lower;
  return {sign * nearest.a, sign * nearest.b};
}

// The lattice for the search in A, and for what that leaves undecided.
template <class A>
struct Lattices {
  Lattice<A> first;
  Lattice<double> second;
};

template <class A>
Lattices<A> lattices(int32_t precision) {
  return {lattice<A>(precision), lattice<double>(precision)};
}

template <class A>
SYNTONIC_BOTH inline Point<A> nearest_of_undecided(const Lattices<A>& lattices, A x) {
  Point<double> point;
  if (sizeof(A) == 4 && nearest_in_the_middle(lattices.second, static_cast<double>(x), point)) {
    return {static_cast<A>(point.a), static_cast<A>(point.b)};
  }
  const Point<int32_t> found = nearest_by_levels(lattices.first.precision, static_cast<double>(x));
  return {static_cast<A>(found.a), static_cast<A>(found.b)};
}

// Of N numbers: first what a few multiplications decide of all of them, without a branch, then the
// others one by one.
template <class A, int N>
SYNTONIC_BOTH inline void nearest(const Lattices<A>& lattices, const A (&x)[N],
                                  Point<A> (&point)[N]) {
  uint32_t undecided = 0;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int e = 0; e < N; ++e) {
    undecided |= nearest_in_the_middle(lattices.first, x[e], point[e]) ? 0u : 1u << e;
  }
  for (; undecided != 0; undecided &= undecided - 1) {
    const uint32_t lowest = undecided & (0u - undecided);
    A one = 0;
    // Without a run-time index, which would move the array to memory.
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int e = 0; e < N; ++e) one = lowest == 1u << e ? x[e] : one;
    const Point<A> found = nearest_of_undecided(lattices, one);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int e = 0; e < N; ++e) point[e] = lowest == 1u << e ? found : point[e];
  }
}

}  // namespace syntonic
