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
#include <type_traits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t kWidth = 256;  // rows of fewer elements are joined to at least this many, for long inner loops
constexpr int64_t kChunk = 32;   // joined rows per chunk, few because their sums are in the type of the arithmetic
constexpr int64_t kSplits = 64;  // the most splits

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };
using T = DTYPE;
using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
constexpr int kTerms = sizeof(T) == 2 ? 4 : 7;  // of the series of exp(r) - 1, for a relative error of 1e-4 or 2e-8

template <class To, class From> To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

inline float load(float value) { return value; }
inline double load(double value) { return value; }
inline float load(BFloat16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }
inline float load(Half value) {
  uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  float finite = bit_cast<float>(magnitude) * 0x1p112f;  // also right for subnormal numbers
  uint32_t bits = (value.bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : bit_cast<uint32_t>(finite);
  return bit_cast<float>(bits | uint32_t(value.bits & 0x8000) << 16);
}

// Rounding is to nearest even.
inline void store(float* to, float value) { *to = value; }
inline void store(double* to, double value) { *to = value; }
inline void store(BFloat16* to, float value) {
  uint32_t bits = bit_cast<uint32_t>(value);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to->bits = uint16_t(value == value ? rounded : 0x7fc0);
}
inline void store(Half* to, float value) {
  uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  uint32_t normal = (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13;
  uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  uint32_t result = magnitude < 0x38800000 ? subnormal : magnitude < 0x477ff000 ? normal : special;
  to->bits = uint16_t(result | (bits >> 16 & 0x8000));
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

// exp(t) - subtract for t <= 0 and subtract 0 or 1. If t = n ln 2 + r, it is 2^n (exp(r) - 1) + (2^n - subtract), which
// keeps the digits near 0.
inline float exponential(float t, float subtract) {
  constexpr float kAll[] = {1.0f, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};
  constexpr float kFew[] = {1.0f, 1.0f / 2, 1.0f / 6, 1.0f / 24};
  t = t < -87.0f ? -87.0f : t;
  float shifted = multiply_add(t, 1.44269504f, 12582912.0f);  // 1.5 2^23, so the low bits are n
  float n = shifted - 12582912.0f;
  float r = multiply_add(n, -1.42860677e-6f, multiply_add(n, -0.693145752f, t));
  float power = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + 0x3f800000);  // 2^n
  float series = r * (kTerms == 7 ? polynomial(kAll, r) : polynomial(kFew, r));
  return multiply_add(series, power, power - subtract);
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
    return kTerms == 4 ? negative * inverse : multiply_add(negative, inverse, negative * rest);
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
  int64_t joined() const { return std::max<int64_t>(1, (kWidth + c - 1) / c); }  // rows
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

  // Call body(element, position in the joined row) for all elements of some rows.
  template <class Body> void for_elements(int64_t rows, Body body) const {
    int64_t width = joined() * c, total = rows * c;
    for (int64_t start = 0; start < total; start += width) {
      int64_t length = std::min(width, total - start);
#pragma omp simd
      for (int64_t i = 0; i < length; i++) body(start + i, i);
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

  // Repeat values per channel for joined rows.
  std::vector<A> repeat(const A* values) const {
    std::vector<A> result(joined() * c);
    for (size_t i = 0; i < result.size(); i++) result[i] = values[i % c];
    return result;
  }

  // Sum the values of a channel in a joined row.
  double sum(const std::vector<A>& values, int64_t channel) const {
    double result = 0;
    for (size_t i = channel; i < values.size(); i += c) result += values[i];
    return result;
  }
};

// 2 x 2 max-pool. As in torch, the first maximum wins, but the last NaN.
void pool_rows(const T* x, T* pooled, uint8_t* argmax, int64_t first, int64_t count, const Shape& shape) {
  int64_t c = shape.c, line = shape.w * c;
  shape.for_windows(first, count, [=](int64_t row, int64_t corner, int64_t, int64_t) {
    const T* window = x + corner;
    T* to = pooled + row * c;
    uint8_t* index_to = argmax + row * c;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) {
      A value = load(window[i]), others[] = {load(window[c + i]), load(window[line + i]), load(window[line + c + i])};
      int32_t index = 0;
      for (int k = 0; k < 3; k++) {
        bool better = others[k] > value || others[k] != others[k];
        value = better ? others[k] : value;
        index = better ? k + 1 : index;
      }
      store(to + i, value);
      index_to[i] = uint8_t(index);
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

// Count, mean and sum of squared deviations of a part, merged by the formula of Chan, Golub and LeVeque (1979).
struct Moments {
  double count = 0, mean = 0, square = 0;
  void merge(const Moments& other) {
    double total = count + other.count, delta = other.mean - mean;
    mean += delta * (other.count / total);
    square += other.square + delta * delta * (count * other.count / total);
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
  std::vector<Moments> parts(shape.splits() * c);
  struct State { std::vector<A> origin, sums, squares; bool started; };
  auto make = [&] { return State{std::vector<A>(shape.joined() * c), {}, {}, false}; };
  shape.for_chunks(false, make, [&](State& state, int64_t split, int64_t first, int64_t count) {
    if (shape.pool == 2) pool_rows(x, pooled + first * c, argmax + first * c, first, count, shape);
    const T* values = (shape.pool == 2 ? pooled : x) + first * c;
    // Deviations from the mean of the chunk before lose no digits. The first chunk is read twice.
    for (int pass = state.started; pass < 2; pass++) {
      state.sums.assign(shape.joined() * c, 0);
      state.squares.assign(shape.joined() * c, 0);
      A *origin = state.origin.data(), *sums = state.sums.data(), *squares = state.squares.data();
      shape.for_elements(count, [=](int64_t element, int64_t i) {
        A deviation = load(values[element]) - origin[i];
        sums[i] += deviation;
        squares[i] = multiply_add(deviation, deviation, squares[i]);
      });
      for (int64_t channel = 0; channel < c; channel++) {
        double sum = shape.sum(state.sums, channel), mean = sum / count;
        double square = std::max(shape.sum(state.squares, channel) - sum * mean, 0.0);
        if (pass == 1) parts[split * c + channel].merge({double(count), origin[channel] + mean, square});
        A next = A(origin[channel] + mean);
        for (int64_t i = channel; i < shape.joined() * c; i += c) origin[i] = next;
      }
    }
    state.started = true;
  });
  for (int64_t channel = 0; channel < c; channel++) {
    Moments all;
    for (int64_t split = 0; split < shape.splits(); split++) all.merge(parts[split * c + channel]);
    moments[channel] = all.mean;
    moments[c + channel] = all.square;
  }
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
      T* to = y + first * c;
      shape.for_elements(count, [=](int64_t element, int64_t i) {
        A z = multiply_add(load(values[element]) - mean[i], scale[i], shift[i]);
        store(to + element, function.value(z));
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
      state.of_q.assign(shape.joined() * c, 0);
      state.of_qd.assign(shape.joined() * c, 0);
      const T *values = x + first * c, *gradients = dy + first * c;
      A *of_q = state.of_q.data(), *of_qd = state.of_qd.data();
      shape.for_elements(count, [=](int64_t element, int64_t i) {
        A centered = load(values[element]) - mean[i];
        A q = load(gradients[element]) * function.slope(multiply_add(centered, scale[i], shift[i]));
        of_q[i] += q;
        of_qd[i] = multiply_add(q, centered, of_qd[i]);
      });
      for (int64_t channel = 0; channel < c; channel++) {
        parts[split * 2 * c + channel] += shape.sum(state.of_q, channel);
        parts[(split * 2 + 1) * c + channel] += shape.sum(state.of_qd, channel);
      }
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
      shape.for_elements(count, [=](int64_t element, int64_t i) {
        A centered = load(values[element]) - mean[i];
        A q = load(gradients[element]) * function.slope(multiply_add(centered, scale[i], shift[i]));
        store(to + element, multiply_add(centered, -slope[i], q - level[i]) * scale[i]);
      });
      if (shape.pool == 2) unpool_rows(to, argmax, dx, first, count, shape);
    });
  });
}

// Write the batch of augment.py. The tensors are contiguous. draws [4, batch] has rows of row_stride elements.
// Return the first image whose draws are out of range, or -1.
int64_t augment(const uint8_t* images, const int64_t* draws, const T* table, T* out, int64_t n, int64_t batch,
                int64_t row_stride, int64_t size, int64_t channels, int64_t out_channels, int64_t padding,
                int64_t cutout_size, int64_t threads) {
  int64_t crops = padding + 1, corners = size + 1 - cutout_size;
  const int64_t *permutation = draws, *crop = draws + row_stride, *flip = crop + row_stride, *cutout = flip + row_stride;
  for (int64_t b = 0; b < batch; b++) {
    bool valid = permutation[b] >= 0 && permutation[b] < n && crop[b] >= 0 && crop[b] < crops * crops &&
                 cutout[b] >= 0 && cutout[b] < corners * corners;
    if (!valid) return b;
  }
#pragma omp parallel for num_threads(threads)
  for (int64_t b = 0; b < batch; b++) {
    const uint8_t* image = images + permutation[b] * size * size * channels;
    T* to = out + b * size * size * out_channels;
    int64_t cut_left = cutout[b] / corners, cut_top = cutout[b] % corners;
    for (int64_t y = 0; y < size; y++) {
      int64_t row = std::abs(y + crop[b] % crops - padding);
      bool cut_row = y >= cut_top && y < cut_top + cutout_size;
      for (int64_t x = 0; x < size; x++, to += out_channels) {
        int64_t column = std::abs((flip[b] == 0 ? size - 1 - x : x) + crop[b] / crops - padding);
        std::memset(static_cast<void*>(to), 0, out_channels * sizeof(T));
        if (cut_row && x >= cut_left && x < cut_left + cutout_size) continue;
        const uint8_t* pixel = image + (row * size + column) * channels;
        for (int64_t i = 0; i < channels; i++) to[i] = table[i * 256 + pixel[i]];
      }
    }
  }
  return -1;
}
}
