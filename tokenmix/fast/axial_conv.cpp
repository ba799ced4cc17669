// Depth-wise convolutions along one axis of a channels-last map on the CPU, stride 1, zero-padded to the same size.
//
// Arrays hold (B, H, W, C), weights (C, k). Along the width a line is a row of a map, along the height an image, and its
// items are pixels of C numbers or rows of W * C numbers: an item of the result is a sum of items times taps.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace {

struct Sizes {
  int64_t lines, items, repeats, C, k;  // an item is `repeats` pixels
  int64_t pixel(int64_t line, int64_t item, int64_t at) const { return ((line * items + item) * repeats + at) * C; }
};

template <typename F>
void parallel(int64_t count, int threads, F&& work) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) work(t, count * t / threads, count * (t + 1) / threads);
}

// N channels of y[item] = bias + the sum over taps of x[item + tap - k / 2] * taps[tap].
template <int N, typename T>
inline void block(const T* from, const T* taps, int64_t count, int64_t step, int64_t C, const T* bias, T* out) {
  T sum[N];
  for (int l = 0; l < N; ++l) sum[l] = bias ? bias[l] : T(0);
  for (int64_t tap = 0; tap < count; ++tap)
    for (int l = 0; l < N; ++l) sum[l] += from[tap * step + l] * taps[tap * C + l];
  for (int l = 0; l < N; ++l) out[l] = sum[l];
}

template <typename T>
void convolve(const T* x, const std::vector<T>& taps, const T* bias, T* y, Sizes m, int threads) {
  const int64_t p = m.k / 2, step = m.repeats * m.C;
  parallel(m.lines * m.items, threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t line = at / m.items, item = at % m.items;
      const int64_t first = std::max<int64_t>(0, p - item), count = std::min(m.k, m.items + p - item) - first;
      for (int64_t pixel = 0; pixel < m.repeats; ++pixel) {
        const T *from = x + m.pixel(line, item + first - p, pixel), *w = taps.data() + first * m.C;
        T* out = y + m.pixel(line, item, pixel);
        int64_t c = 0;
        auto run = [&](auto size) {
          constexpr int N = decltype(size)::value;
          for (; c + N <= m.C; c += N) block<N>(from + c, w + c, count, step, m.C, bias ? bias + c : bias, out + c);
        };
        run(std::integral_constant<int, 32>());
        run(std::integral_constant<int, 16>());
        run(std::integral_constant<int, 8>());
        run(std::integral_constant<int, 1>());
      }
    }
  });
}

// Taps as rows of C numbers, or the same in reverse.
template <typename T>
std::vector<T> rows(const T* weight, Sizes m, bool reversed) {
  std::vector<T> taps(m.k * m.C);
  for (int64_t c = 0; c < m.C; ++c)
    for (int64_t tap = 0; tap < m.k; ++tap) taps[tap * m.C + c] = weight[c * m.k + (reversed ? m.k - 1 - tap : tap)];
  return taps;
}

// The gradients of taps and bias are added up item by item, then thread by thread.
template <typename T>
void slopes(const T* x, const T* grad, T* grad_weight, T* grad_bias, Sizes m, int threads) {
  const int64_t p = m.k / 2, size = (m.k + 1) * m.C;
  std::vector<T> totals(threads * size, T(0));
  parallel(m.lines * m.items, threads, [&](int t, int64_t begin, int64_t end) {
    std::vector<T> sums(size);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t line = at / m.items, item = at % m.items;
      const int64_t first = std::max<int64_t>(0, p - item), last = std::min(m.k, m.items + p - item);
      std::fill(sums.begin(), sums.end(), T(0));
      for (int64_t pixel = 0; pixel < m.repeats; ++pixel) {
        const T* d = grad + m.pixel(line, item, pixel);
        for (int64_t tap = first; tap < last; ++tap) {
          const T* row = x + m.pixel(line, item + tap - p, pixel);
          T* sum = sums.data() + tap * m.C;
#pragma omp simd
          for (int64_t c = 0; c < m.C; ++c) sum[c] += d[c] * row[c];
        }
        T* sum = sums.data() + m.k * m.C;
#pragma omp simd
        for (int64_t c = 0; c < m.C; ++c) sum[c] += d[c];
      }
      T* total = totals.data() + t * size;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) total[i] += sums[i];
    }
  });
  for (int t = 1; t < threads; ++t)
    for (int64_t i = 0; i < size; ++i) totals[i] += totals[t * size + i];
  for (int64_t c = 0; c < m.C; ++c) {
    for (int64_t tap = 0; tap < m.k; ++tap) grad_weight[c * m.k + tap] = totals[tap * m.C + c];
    grad_bias[c] = totals[m.k * m.C + c];
  }
}

Sizes sizes(int64_t B, int64_t H, int64_t W, int64_t C, int64_t k, int rows) {
  return rows ? Sizes{B * H, W, 1, C, k} : Sizes{B, H, W, C, k};
}

}  // namespace

#define SIZES int64_t B, int64_t H, int64_t W, int64_t C, int64_t kernel, int rows_, int threads
#define EXPORT(T, suffix)                                                                                         \
  extern "C" void axial_conv_forward_##suffix(const T* x, const T* weight, const T* bias, T* y, SIZES) {          \
    const Sizes m = sizes(B, H, W, C, kernel, rows_);                                                             \
    convolve<T>(x, rows(weight, m, false), bias, y, m, threads);                                                  \
  }                                                                                                               \
  extern "C" void axial_conv_backward_##suffix(const T* x, const T* weight, const T* grad, T* grad_x,             \
                                               T* grad_weight, T* grad_bias, SIZES) {                             \
    const Sizes m = sizes(B, H, W, C, kernel, rows_);                                                             \
    convolve<T>(grad, rows(weight, m, true), nullptr, grad_x, m, threads);                                        \
    slopes<T>(x, grad, grad_weight, grad_bias, m, threads);                                                       \
  }

EXPORT(float, float32)
EXPORT(double, float64)
