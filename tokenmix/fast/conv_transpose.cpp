// A depth-wise transposed convolution with equal kernel and stride on the CPU: every pixel times a kernel x kernel
// patch. Nothing overlaps, so it is one pass over memory.
//
// Arrays are channels-last: x holds (B, H, W, C), y (B, H * k, W * k, D) with D = C / g groups of g channels, weights
// (C, k, k). One line of a patch is k * D numbers that lie side by side in y; weights and pixels are laid out alike.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

struct Sizes {
  int64_t B, H, W, C, D, k;
  int64_t group() const { return C / D; }
  int64_t line() const { return k * D; }
  int64_t weights() const { return k * k * C; }
  // Where line a of the patch of pixel s begins; a row is one of all images' rows.
  int64_t patch(int64_t row, int64_t s, int64_t a) const { return ((row * k + a) * W + s) * line(); }

  // Weights as lines: (line a, channel i of a group, place c, group j) and where they are in (C, k, k).
  template <typename F>
  void each_weight(F&& weight) const {
    int64_t to = 0;
    for (int64_t a = 0; a < k; ++a)
      for (int64_t i = 0; i < group(); ++i)
        for (int64_t c = 0; c < k; ++c)
          for (int64_t j = 0; j < D; ++j) weight(to++, ((j * group() + i) * k + a) * k + c);
  }
};

template <typename F>
void parallel(int64_t count, int threads, F&& work) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) work(t, count * t / threads, count * (t + 1) / threads);
}

// A pixel as lines, one per channel i of a group: channel i of every group j, at all places c.
template <typename T>
inline void deal(const T* pixel, T* lines, const Sizes& m) {
  const int64_t g = m.group();
  for (int64_t i = 0; i < g; ++i) {
    T* line = lines + i * m.line();
    for (int64_t j = 0; j < m.D; ++j) line[j] = pixel[j * g + i];
    for (int64_t c = 1; c < m.k; ++c) std::copy(line, line + m.D, line + c * m.D);
  }
}

template <typename T>
void forward(const T* x, const T* weight, const T* bias, T* y, Sizes m, int threads) {
  const int64_t g = m.group(), n = m.line();
  std::vector<T> turned(m.weights()), shift(n, T(0));
  m.each_weight([&](int64_t to, int64_t from) { turned[to] = weight[from]; });
  for (int64_t l = 0; bias && l < n; ++l) shift[l] = bias[l % m.D];
  parallel(m.B * m.H, threads, [&](int, int64_t begin, int64_t end) {
    std::vector<T> lines(g * n);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t s = 0; s < m.W; ++s) {
        deal(x + (row * m.W + s) * m.C, lines.data(), m);
        for (int64_t a = 0; a < m.k; ++a) {
          const T* w = turned.data() + a * g * n;
          T* out = y + m.patch(row, s, a);
#pragma omp simd
          for (int64_t l = 0; l < n; ++l) out[l] = shift[l] + lines[l] * w[l];
          for (int64_t i = n; i < g * n; i += n)
#pragma omp simd
            for (int64_t l = 0; l < n; ++l) out[l] += lines[i + l] * w[i + l];
        }
      }
  });
}

// The gradients of weights and bias are added up row by row, then thread by thread.
template <typename T>
void backward(const T* x, const T* weight, const T* grad, T* grad_x, T* grad_weight, T* grad_bias, Sizes m,
              int threads) {
  const int64_t g = m.group(), n = m.line(), size = m.weights() + n;
  std::vector<T> turned(m.weights()), totals(threads * size, T(0));
  m.each_weight([&](int64_t to, int64_t from) { turned[to] = weight[from]; });
  parallel(m.B * m.H, threads, [&](int t, int64_t begin, int64_t end) {
    std::vector<T> lines(g * n), slopes(g * n), sums(size);
    T* shift = sums.data() + m.weights();
    for (int64_t row = begin; row < end; ++row) {
      std::fill(sums.begin(), sums.end(), T(0));
      for (int64_t s = 0; s < m.W; ++s) {
        deal(x + (row * m.W + s) * m.C, lines.data(), m);
        std::fill(slopes.begin(), slopes.end(), T(0));
        for (int64_t a = 0; a < m.k; ++a) {
          const T* d = grad + m.patch(row, s, a);
          for (int64_t i = 0; i < g * n; i += n) {
            const T* w = turned.data() + a * g * n + i;
            T *sum = sums.data() + a * g * n + i, *slope = slopes.data() + i;
            const T* line = lines.data() + i;
#pragma omp simd
            for (int64_t l = 0; l < n; ++l) {
              slope[l] += d[l] * w[l];
              sum[l] += d[l] * line[l];
            }
          }
#pragma omp simd
          for (int64_t l = 0; l < n; ++l) shift[l] += d[l];
        }
        T* out = grad_x + (row * m.W + s) * m.C;
        for (int64_t i = 0; i < g; ++i)
          for (int64_t j = 0; j < m.D; ++j) {
            T sum = 0;
            for (int64_t l = j; l < n; l += m.D) sum += slopes[i * n + l];
            out[j * g + i] = sum;
          }
      }
      for (int64_t i = 0; i < size; ++i) totals[t * size + i] += sums[i];
    }
  });
  for (int t = 1; t < threads; ++t)
    for (int64_t i = 0; i < size; ++i) totals[i] += totals[t * size + i];
  m.each_weight([&](int64_t from, int64_t to) { grad_weight[to] = totals[from]; });
  std::fill(grad_bias, grad_bias + m.D, T(0));
  for (int64_t l = 0; l < n; ++l) grad_bias[l % m.D] += totals[m.weights() + l];
}

}  // namespace

#define SIZES int64_t B, int64_t H, int64_t W, int64_t C, int64_t D, int64_t kernel, int threads
#define EXPORT(T, suffix)                                                                                            \
  extern "C" void conv_transpose_forward_##suffix(const T* x, const T* weight, const T* bias, T* y, SIZES) {         \
    forward<T>(x, weight, bias, y, {B, H, W, C, D, kernel}, threads);                                                \
  }                                                                                                                  \
  extern "C" void conv_transpose_backward_##suffix(const T* x, const T* weight, const T* grad, T* grad_x,            \
                                                   T* grad_weight, T* grad_bias, SIZES) {                            \
    backward<T>(x, weight, grad, grad_x, grad_weight, grad_bias, {B, H, W, C, D, kernel}, threads);                  \
  }

EXPORT(float, float32)
EXPORT(double, float64)
