// The operators on a CPU, for tensors of the type T: batch norm with pool and activation, and the augmentation.
//
// cpu.py compiles this file for each type and calls it. Tensors are channels_last, so the channels of a pixel (a row) are
// neighbors in memory. Arithmetic is in float32, or in float64 if T is. A chunk of rows stays in the cache; its sums are
// in the type of the arithmetic. A split has several chunks. Sums over chunks and splits are in float64, in the order of
// the rows. The number of threads changes no sum, so it does not change a bit of the results.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t kWidth = 256;  // rows of fewer elements are joined to at least this many, for long inner loops
constexpr int64_t kChunk = 128;   // joined rows per chunk, few because their sums are in the type of the arithmetic
constexpr int64_t kSplits = 64;  // the most splits

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };
using T = DTYPE;
using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

template <class To, class From> To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// Two elements of 16 bits are read and written as one word of 32 bits, so that vectors need no shuffles.
typedef std::conditional_t<sizeof(T) == 2, uint32_t, T> Word __attribute__((aligned(alignof(T)), may_alias));
constexpr int kLanes = sizeof(Word) / sizeof(T);

// The value of the low 16 bits.
inline float widen(uint32_t bits) {
  if constexpr (std::is_same_v<T, BFloat16>) return bit_cast<float>(bits << 16);
  uint32_t magnitude = (bits & 0x7fff) << 13;
  float finite = bit_cast<float>(magnitude) * 0x1p112f;  // also right for subnormal numbers
  uint32_t all = (bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : bit_cast<uint32_t>(finite);
  return bit_cast<float>(all | (bits & 0x8000) << 16);
}

// The low 16 bits of a value, rounded to nearest even.
inline uint32_t narrow(float value) {
  uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  // The sum keeps every NaN but those whose low 17 bits are all ones; see Shape::repeat.
  if constexpr (std::is_same_v<T, BFloat16>) return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  uint32_t normal = (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13;
  uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  return (magnitude < 0x38800000 ? subnormal : magnitude < 0x477ff000 ? normal : special) | (bits >> 16 & 0x8000);
}

inline float element(uint32_t word, int lane) { return widen(lane ? word >> 16 : word & 0xffff); }
inline float element(float word, int) { return word; }
inline double element(double word, int) { return word; }
inline Word word_of(A first, A second) {
  if (kLanes == 1) return Word(first);
  return Word(narrow(float(first)) | narrow(float(second)) << 16);
}

template <class V> inline V multiply_add(V a, V b, V c) {
#if defined(__FMA__) || defined(__aarch64__)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// coefficients[0] + coefficients[1] x + ...
template <int N, int I = 0> inline float polynomial(const float (&coefficients)[N], float x) {
  if constexpr (I == N - 1) return coefficients[I];
  else return multiply_add(polynomial<N, I + 1>(coefficients, x), x, coefficients[I]);
}

// exp(t) - subtract for t <= 0 and subtract 0 or 1, with a relative error of 2e-8, or 3e-6 for types of 16 bits. If
// t = n ln 2 + r, it is 2^n (exp(r) - 1) + (2^n - subtract), which keeps the digits near 0.
inline float exponential(float t, float subtract) {
  constexpr float kLog2e = 1.44269504f, kRound = 12582912.0f;  // 1.5 2^23: a sum with it has n in its low bits
  t = t < -87.0f ? -87.0f : t;
  float shifted = multiply_add(t, kLog2e, kRound), n = shifted - kRound;
  uint32_t exponent = bit_cast<uint32_t>(shifted) << 23;
  if constexpr (sizeof(T) == 2) {
    constexpr float kFit[] = {0.6931241934f, 0.2402409861f, 0.05590642475f, 0.009582853122f};  // of (2^r - 1) / r
    float r = multiply_add(t, kLog2e, -n), fit = polynomial(kFit, r);
    if (subtract == 0) return bit_cast<float>(bit_cast<uint32_t>(multiply_add(fit, r, 1.0f)) + exponent);
    float power = bit_cast<float>(exponent + 0x3f800000);
    return multiply_add(fit * r, power, power - subtract);
  }
  constexpr float kSeries[] = {1.0f, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};
  float r = multiply_add(n, -1.42860677e-6f, multiply_add(n, -0.693145752f, t));
  float power = bit_cast<float>(exponent + 0x3f800000);  // 2^n
  return multiply_add(r * polynomial(kSeries, r), power, power - subtract);
}
inline double exponential(double t, double subtract) { return subtract == 0 ? std::exp(t) : std::expm1(t); }

inline A sigmoid(A z) {
  A power = exponential(z < 0 ? z : -z, 0);
  return (z < 0 ? power : A(1)) / (1 + power);
}

// The distribution function of the normal distribution at z; density becomes exp(-z^2 / 2).
inline float normal_cdf(float z, float& density) {
  // erfc(a) exp(a^2) / t is a polynomial of t = 1 / (1 + a / 2), fitted to 1.1e-8 of its value for all a >= 0.
  constexpr float kFit[] = {0.2820947956f,  0.2820937208f, 0.246885388f,   0.1753071025f, 0.0935146559f, -0.0593937803f,
                            0.1325727521f, -0.4555120698f, 0.4941409248f, -0.2349394953f, 0.0432360103f};
  float t = 1 / multiply_add(z < 0 ? -z : z, 0.35355339f, 1.0f);
  density = exponential(-0.5f * z * z, 0);
  float tail = 0.5f * t * polynomial(kFit, t) * density;
  return z < 0 ? tail : 1 - tail;
}
inline double normal_cdf(double z, double& density) {
  density = exponential(-0.5 * z * z, 0);
  return 0.5 * std::erfc(z * -0.70710678118654752440);
}

// Activations: their value and slope at z.
struct None {
  A value(A z) const { return z; }
  A slope(A) const { return 1; }
};
struct Celu {
  A alpha, inverse, rest;  // inverse + rest is 1 / alpha with the precision of a division

  explicit Celu(double a) : alpha(A(a)), inverse(A(1 / a)), rest(A(1 / a - double(inverse))) {}
  A scaled(A z) const {
    A negative = z < 0 ? z : 0;
    return sizeof(T) == 2 ? negative * inverse : multiply_add(negative, inverse, negative * rest);
  }
  A value(A z) const {
    A below = alpha * exponential(scaled(z), 1);
    return z < 0 ? below : z;
  }
  A slope(A z) const { return exponential(scaled(z), 0); }
};
struct Relu {
  A value(A z) const { return z < 0 ? A(0) : z; }
  A slope(A z) const { return z <= 0 ? A(0) : A(1); }
};
struct Gelu {
  A value(A z) const {
    A density;
    return z * normal_cdf(z, density);
  }
  A slope(A z) const {
    A density, cdf = normal_cdf(z, density);
    return multiply_add(z * A(0.39894228040143267794), density, cdf);
  }
};
struct GeluTanh {  // z (1 + tanh(u)) / 2 = z sigmoid(2 u) for u = sqrt(2 / pi) (z + 0.044715 z^3)
  static constexpr A kScale = A(1.5957691216057308), kCubic = A(0.044715);
  static A gate(A z) { return sigmoid(kScale * z * multiply_add(kCubic * z, z, A(1))); }
  A value(A z) const { return z * gate(z); }
  A slope(A z) const {
    A s = gate(z);
    return s * multiply_add(z * (1 - s), kScale * multiply_add(3 * kCubic * z, z, A(1)), A(1));
  }
};
struct Silu {
  A value(A z) const { return z * sigmoid(z); }
  A slope(A z) const {
    A s = sigmoid(z);
    return s * multiply_add(z, 1 - s, A(1));
  }
};

// Sizes of the tensor before the pool. cpu.py has the same fields in the same order.
struct Shape {
  int64_t n, c, h, w, pool, threads;

  int64_t out_h() const { return h / pool; }
  int64_t out_w() const { return w / pool; }
  int64_t rows() const { return n * out_h() * out_w(); }
  int64_t joined() const { int64_t r = (kWidth + c - 1) / c; return r + r * c % kLanes; }  // rows, of whole words
  int64_t width() const { return joined() * c; }                                     // elements of joined rows
  int64_t chunk() const { return kChunk * joined(); }                            // rows
  int64_t chunks() const { return (rows() + chunk() - 1) / chunk(); }
  int64_t splits() const { return std::min(kSplits, chunks()); }

  // Call make(), then body(its result, split, first row, number of rows) for the chunks of each split. A pass that goes
  // backwards begins with the rows that the pass before read last, which the cache still holds.
  template <class Make, class Body> void for_chunks(bool backwards, Make make, Body body) const {
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
      int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
#else
      int64_t thread = 0, count = 1;
#endif
      int64_t begin = splits() * thread / count, end = splits() * (thread + 1) / count;
      for (int64_t i = begin; i < end; i++) {
        int64_t split = backwards ? begin + end - 1 - i : i;
        int64_t first = chunks() * split / splits(), last = chunks() * (split + 1) / splits();
        auto state = make();
        for (int64_t j = first; j < last; j++) {
          int64_t row = (backwards ? first + last - 1 - j : j) * chunk();
          body(state, split, row, std::min(chunk(), rows() - row));
        }
      }
    }
  }

  // Call body(position, channel) for the elements of joined rows. First lanes of words come first, then second lanes.
  template <class Body> void for_positions(Body body) const {
    int64_t words = width() / kLanes;
    for (int64_t lane = 0; lane < kLanes; lane++)
      for (int64_t i = 0, channel = lane % c; i < words; i++) {
        body(lane * words + i, channel);
        for (channel += kLanes; channel >= c;) channel -= c;
      }
  }

  // Write to = body(from, other, position) for all elements of some rows, or only call body without a place to write to.
  template <class To, class Body> void for_elements(int64_t rows, const T* from, const T* other, To to, Body body) const {
    constexpr bool kWrites = std::is_same_v<To, T*>;
    int64_t words = width() / kLanes;
    for (int64_t start = 0; start < rows * c; start += width()) {
      int64_t length = std::min(width(), rows * c - start), whole = length / kLanes;
      auto a = reinterpret_cast<const Word*>(from + start), b = reinterpret_cast<const Word*>(other + start);
      Word* result = nullptr;
      if constexpr (kWrites) result = reinterpret_cast<Word*>(to + start);
      auto pair = [=](Word x, Word y, int64_t i) {
        A first = body(element(x, 0), element(y, 0), i), second = first;
        if constexpr (kLanes == 2) second = body(element(x, 1), element(y, 1), words + i);
        return word_of(first, second);
      };
#pragma omp simd
      for (int64_t i = 0; i < whole; i++) {
        if constexpr (kWrites) result[i] = pair(a[i], b[i], i);
        else pair(a[i], b[i], i);
      }
      if (length % kLanes) {  // half a word
        Bits x = reinterpret_cast<const Bits*>(a)[length - 1], y = reinterpret_cast<const Bits*>(b)[length - 1];
        A value = body(element(Word(x), 0), element(Word(y), 0), whole);
        if constexpr (kWrites) reinterpret_cast<Bits*>(result)[length - 1] = Bits(word_of(value, value));
      }
    }
  }

  // Call body(row, offset of the window's first pixel, line, column) for rows of the pooled tensor, counted from first.
  template <class Body> void for_windows(int64_t first, int64_t count, Body body) const {
    int64_t column = first % out_w(), line = first / out_w() % out_h(), image = first / out_w() / out_h();
    for (int64_t row = 0; row < count; row++) {
      body(row, ((image * h + line * 2) * w + column * 2) * c, line, column);
      if (++column == out_w()) column = 0, line++;
      if (line == out_h()) line = 0, image++;
    }
  }

  // Repeat values per channel for joined rows. Each NaN becomes the same one, which narrow() keeps.
  std::vector<A> repeat(const A* values) const {
    std::vector<A> result(width());
    for_positions([&](int64_t i, int64_t channel) {
      result[i] = values[channel] == values[channel] ? values[channel] : std::numeric_limits<A>::quiet_NaN();
    });
    return result;
  }

  // Add the values of joined rows to the totals of their channels.
  void add(const std::vector<A>& values, double* totals) const {
    for_positions([&](int64_t i, int64_t channel) { totals[channel] += values[i]; });
  }
};

// The maximum of a window and its index. As in torch, the first maximum wins, but the last NaN.
inline A window_maximum(A value, A second, A third, A fourth, uint32_t& index) {
  A others[] = {second, third, fourth};
  index = 0;
  for (uint32_t k = 0; k < 3; k++) {
    bool better = others[k] > value || others[k] != others[k];
    value = better ? others[k] : value;
    index = better ? k + 1 : index;
  }
  return value;
}

// 2 x 2 max-pool.
void pool_rows(const T* x, T* pooled, uint8_t* argmax, int64_t first, int64_t count, const Shape& shape) {
  using Indices = std::conditional_t<kLanes == 2, uint16_t, uint8_t>;
  typedef Indices Unaligned __attribute__((aligned(1), may_alias));
  int64_t c = shape.c, line = shape.w * c;
  shape.for_windows(first, count, [=](int64_t row, int64_t corner, int64_t, int64_t) {
    const T* pixels[] = {x + corner, x + corner + c, x + corner + line, x + corner + line + c};
    auto a = reinterpret_cast<const Word*>(pixels[0]), b = reinterpret_cast<const Word*>(pixels[1]);
    auto d = reinterpret_cast<const Word*>(pixels[2]), e = reinterpret_cast<const Word*>(pixels[3]);
    auto to = reinterpret_cast<Word*>(pooled + row * c);
    auto index_to = reinterpret_cast<Unaligned*>(argmax + row * c);
#pragma omp simd simdlen(16)
    for (int64_t i = 0; i < c / kLanes; i++) {
      uint32_t index[2] = {0, 0};
      A values[2];
      for (int k = 0; k < kLanes; k++)
        values[k] = window_maximum(element(a[i], k), element(b[i], k), element(d[i], k), element(e[i], k), index[k]);
      to[i] = word_of(values[0], values[kLanes - 1]);
      index_to[i] = Indices(index[0] | index[1] << 8);
    }
    if (c % kLanes) {  // half a word
      uint32_t index;
      A corners[4];
      for (int k = 0; k < 4; k++) corners[k] = element(Word(reinterpret_cast<const Bits*>(pixels[k])[c - 1]), 0);
      A value = window_maximum(corners[0], corners[1], corners[2], corners[3], index);
      reinterpret_cast<Bits*>(pooled + row * c)[c - 1] = Bits(word_of(value, value));
      argmax[row * c + c - 1] = uint8_t(index);
    }
  });
}

// Write the gradients of pooled rows to the maxima of their windows, and zeros elsewhere.
void unpool_rows(const T* gradients, const uint8_t* argmax, T* dx, int64_t first, int64_t count, const Shape& shape) {
  int64_t c = shape.c, line = shape.w * c;
  shape.for_windows(first, count, [=, &shape](int64_t row, int64_t corner, int64_t top, int64_t left) {
    const Bits* from = reinterpret_cast<const Bits*>(gradients) + row * c;
    const uint8_t* index = argmax + (first + row) * c;
    Bits* to = reinterpret_cast<Bits*>(dx) + corner;
    for (int k = 0; k < 4; k++) {
      Bits* pixel = to + (k / 2) * line + (k % 2) * c;
#pragma omp simd
      for (int64_t i = 0; i < c; i++) pixel[i] = from[i] & Bits(-Bits(index[i] == k));
    }
    // An odd last column or line belongs to no window.
    if (shape.w % 2 && left == shape.out_w() - 1)
      for (int k = 0; k < 2; k++) std::fill_n(to + k * line + 2 * c, c, Bits(0));
    if (shape.h % 2 && top == shape.out_h() - 1 && left == 0) std::fill_n(to + 2 * line, line, Bits(0));
  });
}

// Counts, means and sums of squared deviations of a part by channel.
struct Moments {
  double count = 0;
  std::vector<double> mean, square;

  explicit Moments(int64_t channels) : mean(channels), square(channels) {}
  // The formula of Chan, Golub and LeVeque (1979).
  void merge(const Moments& other) {
    double total = count + other.count, share = other.count / total;
    for (size_t i = 0; i < mean.size(); i++) {
      double delta = other.mean[i] - mean[i];
      mean[i] += delta * share;
      square[i] += other.square[i] + delta * delta * (count * share);
    }
    count = total;
  }
};

// Call run(Activation()) for the number of an activation; cpu.py has the same order.
template <class Run> void with_activation(int64_t activation, double alpha, Run run) {
  switch (activation) {
    case 0: return run(None());
    case 1: return run(Celu(alpha));
    case 2: return run(Relu());
    case 3: return run(Gelu());
    case 4: return run(GeluTanh());
    case 5: return run(Silu());
  }
}

}  // namespace

extern "C" {

// Write pooled and argmax if there is a pool, and the mean and the sum of squared deviations: moments [2, C].
void statistics(const T* x, T* pooled, uint8_t* argmax, double* moments, const Shape* given) {
  const Shape shape = *given;
  int64_t c = shape.c;
  std::vector<Moments> parts(shape.splits(), Moments(c));
  struct State { std::vector<A> sums, squares; Moments chunk; bool started; };
  auto make = [&] { return State{{}, {}, Moments(c), false}; };
  shape.for_chunks(false, make, [&](State& state, int64_t split, int64_t first, int64_t count) {
    if (shape.pool == 2) pool_rows(x, pooled + first * c, argmax + first * c, first, count, shape);
    const T* values = (shape.pool == 2 ? pooled : x) + first * c;
    // Deviations from the mean of the chunk before lose no digits. The first chunk is read twice.
    Moments& chunk = state.chunk;
    chunk.count = double(count);
    for (int pass = state.started; pass < 2; pass++) {
      std::vector<A> means(chunk.mean.begin(), chunk.mean.end()), origins = shape.repeat(means.data());
      state.sums.assign(shape.width(), 0);
      state.squares.assign(shape.width(), 0);
      A *origin = origins.data(), *sums = state.sums.data(), *squares = state.squares.data();
      shape.for_elements(count, values, values, nullptr, [=](A value, A, int64_t i) {
        A deviation = value - origin[i];
        sums[i] += deviation;
        squares[i] = multiply_add(deviation, deviation, squares[i]);
        return A(0);
      });
      std::vector<double> total(c);
      std::fill(chunk.square.begin(), chunk.square.end(), 0);
      shape.add(state.sums, total.data());
      shape.add(state.squares, chunk.square.data());
      for (int64_t i = 0; i < c; i++) {
        double deviation = total[i] / count;
        chunk.mean[i] = means[i] + deviation;
        chunk.square[i] = std::max(chunk.square[i] - total[i] * deviation, 0.0);
      }
    }
    state.started = true;
    parts[split].merge(chunk);
  });
  Moments all(c);
  for (const Moments& part : parts) all.merge(part);
  std::copy(all.mean.begin(), all.mean.end(), moments);
  std::copy(all.square.begin(), all.square.end(), moments + c);
}

// Write y = activation((pool(x) - mean) scale + shift) for parameters [3, C]: mean, scale, shift.
void apply(const T* x, T* y, const A* parameters, int64_t activation, double alpha, const Shape* given) {
  const Shape shape = *given;
  int64_t c = shape.c;
  auto means = shape.repeat(parameters), scales = shape.repeat(parameters + c), shifts = shape.repeat(parameters + 2 * c);
  const A *mean = means.data(), *scale = scales.data(), *shift = shifts.data();
  with_activation(activation, alpha, [&](auto function) {
    struct State { std::vector<T> pooled; std::vector<uint8_t> argmax; };
    int64_t buffer = shape.pool == 2 ? shape.chunk() * c : 0;
    auto make = [&] { return State{std::vector<T>(buffer), std::vector<uint8_t>(buffer)}; };
    shape.for_chunks(true, make, [&](State& state, int64_t, int64_t first, int64_t count) {
      if (buffer) pool_rows(x, state.pooled.data(), state.argmax.data(), first, count, shape);
      const T* values = buffer ? state.pooled.data() : x + first * c;
      shape.for_elements(count, values, values, y + first * c, [=](A value, A, int64_t i) {
        return function.value(multiply_add(value - mean[i], scale[i], shift[i]));
      });
    });
  });
}

// Write dx, and sums [2, C]: dbias = sum q and sum q (x - mean). x is pooled; parameters and invstd are those of forward.
void backward(const T* dy, const T* x, const uint8_t* argmax, T* dx, const A* parameters, const A* invstd, double* sums,
              int64_t activation, double alpha, int64_t training, const Shape* given) {
  const Shape shape = *given;
  int64_t c = shape.c;
  auto means = shape.repeat(parameters), scales = shape.repeat(parameters + c), shifts = shape.repeat(parameters + 2 * c);
  const A *mean = means.data(), *scale = scales.data(), *shift = shifts.data();
  with_activation(activation, alpha, [&](auto function) {
    std::vector<double> parts(shape.splits() * 2 * c);
    struct Sums { std::vector<A> of_q, of_qd; };
    shape.for_chunks(false, [] { return Sums(); }, [&](Sums& state, int64_t split, int64_t first, int64_t count) {
      state.of_q.assign(shape.width(), 0);
      state.of_qd.assign(shape.width(), 0);
      const T *values = x + first * c, *gradients = dy + first * c;
      A *of_q = state.of_q.data(), *of_qd = state.of_qd.data();
      shape.for_elements(count, values, gradients, nullptr, [=](A value, A gradient, int64_t i) {
        A centered = value - mean[i], q = gradient * function.slope(multiply_add(centered, scale[i], shift[i]));
        of_q[i] += q;
        of_qd[i] = multiply_add(q, centered, of_qd[i]);
        return q;
      });
      shape.add(state.of_q, &parts[split * 2 * c]);
      shape.add(state.of_qd, &parts[(split * 2 + 1) * c]);
    });
    std::vector<A> totals(2 * c);  // subtracted in training: sum q / m, and sum q x^ / m / sqrt(var + eps)
    for (int64_t i = 0; i < 2 * c; i++) {
      sums[i] = 0;
      for (int64_t split = 0; split < shape.splits(); split++) sums[i] += parts[split * 2 * c + i];
      double deviation = i < c ? 1.0 : double(invstd[i - c]);
      totals[i] = training ? A(sums[i] * deviation * deviation / shape.rows()) : 0;
    }
    auto levels = shape.repeat(totals.data()), slopes = shape.repeat(totals.data() + c);
    const A *level = levels.data(), *slope = slopes.data();
    auto make = [&] { return std::vector<T>(shape.pool == 2 ? shape.chunk() * c : 0); };
    shape.for_chunks(true, make, [&](std::vector<T>& buffer, int64_t, int64_t first, int64_t count) {
      const T *values = x + first * c, *gradients = dy + first * c;
      T* to = shape.pool == 2 ? buffer.data() : dx + first * c;
      shape.for_elements(count, values, gradients, to, [=](A value, A gradient, int64_t i) {
        A centered = value - mean[i], q = gradient * function.slope(multiply_add(centered, scale[i], shift[i]));
        return multiply_add(centered, -slope[i], q - level[i]) * scale[i];
      });
      if (shape.pool == 2) unpool_rows(to, argmax, dx, first, count, shape);
    });
  });
}

// Write the batch of augment.py, which checks the draws. The tensors are contiguous. draws [4, batch] has rows of
// row_stride elements.
void augment(const uint8_t* images, const int64_t* draws, const T* table, T* out, int64_t batch, int64_t row_stride,
             int64_t size, int64_t channels, int64_t out_channels, int64_t padding, int64_t cutout_size, int64_t offsets,
             int64_t threads) {
  int64_t corners = size + 1 - cutout_size;
  auto reflect = [=](int64_t index) { return size - 1 - std::abs(size - 1 - std::abs(index)); };
  const int64_t *permutation = draws, *crop = draws + row_stride, *flip = crop + row_stride, *cutout = flip + row_stride;
#pragma omp parallel for num_threads(threads)
  for (int64_t b = 0; b < batch; b++) {
    const uint8_t* image = images + permutation[b] * size * size * channels;
    T* to = out + b * size * size * out_channels;
    int64_t cut_left = cutout[b] / corners, cut_top = cutout[b] % corners;
    for (int64_t y = 0; y < size; y++) {
      int64_t row = reflect(y + crop[b] % offsets - padding);
      bool cut_row = y >= cut_top && y < cut_top + cutout_size;
      for (int64_t x = 0; x < size; x++, to += out_channels) {
        int64_t column = reflect((flip[b] == 0 ? size - 1 - x : x) + crop[b] / offsets - padding);
        std::memset(static_cast<void*>(to), 0, out_channels * sizeof(T));
        if (cut_row && x >= cut_left && x < cut_left + cutout_size) continue;
        const uint8_t* pixel = image + (row * size + column) * channels;
        for (int64_t i = 0; i < channels; i++) to[i] = table[i * 256 + pixel[i]];
      }
    }
  }
}
}
