// Axial sampling on the CPU: tokenmix/blocks/kernels/axial_sample.py in one pass over memory.
//
// A plain C interface, so that it needs a C++ compiler and nothing of torch. Arrays are channels-last: x and y hold
// (B, H, W, C), offsets (B, H, W, G) with `stride` elements from one position to the next; number g of a position
// serves the S = C / G channels g*S .. g*S + S - 1. Rows (or columns) do not depend on each other, so the backward
// pass adds up without atomics.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Read positions of one token: left neighbour, and the distance from it.
template <typename T>
inline void locate(const T* offsets, int64_t G, T position, int64_t n, int32_t* left, T* fraction) {
  for (int64_t g = 0; g < G; ++g) {
    const T p = position + offsets[g];
    const T l = std::floor(p);
    fraction[g] = p - l;
    left[g] = l >= T(-2) ? (l <= T(n) ? int32_t(l) : int32_t(n)) : int32_t(-2);  // NaN counts as outside
  }
}

// A strip is what is sampled together: one row of a map, or neighbouring columns that stay in the cache.
struct Strips {
  int64_t B, H, W, C, G, width;
  bool rows;
  int64_t count() const { return rows ? B * H : B * ((W + width - 1) / width); }

  template <typename F>
  void visit(int64_t strip, F&& token) const {
    const int64_t per = rows ? H : (W + width - 1) / width;
    const int64_t b = strip / per, s = strip % per;
    if (rows) {
      for (int64_t j = 0; j < W; ++j) token((b * H + s) * W + j, (b * H + s) * W, 1, j, W);
    } else {
      const int64_t end = std::min(W, (s + 1) * width);
      for (int64_t i = 0; i < H; ++i)
        for (int64_t j = s * width; j < end; ++j) token((b * H + i) * W + j, b * H * W + j, W, i, H);
    }
  }
};

template <typename T, int S_>
void forward(const T* x, const T* offsets, T* y, Strips m, int64_t stride, int64_t begin, int64_t end) {
  const int64_t S = S_ ? S_ : m.C / m.G;
  std::vector<int32_t> left(m.G);
  std::vector<T> fraction(m.G), zeros(S);
  for (int64_t strip = begin; strip < end; ++strip) {
    m.visit(strip, [&](int64_t at, int64_t first, int64_t step, int64_t position, int64_t n) {
      locate(offsets + at * stride, m.G, T(position), n, left.data(), fraction.data());
      const T* line = x + first * m.C;
      T* out = y + at * m.C;
      for (int64_t g = 0; g < m.G; ++g) {
        const int64_t k = left[g];
        const T f = fraction[g];
        const T* near = k >= 0 && k < n ? line + k * step * m.C + g * S : zeros.data();
        const T* far = k >= -1 && k < n - 1 ? line + (k + 1) * step * m.C + g * S : zeros.data();
        for (int64_t s = 0; s < S; ++s) out[g * S + s] = near[s] + (far[s] - near[s]) * f;
      }
    });
  }
}

template <typename T, int S_>
void backward(const T* x, const T* offsets, const T* grad, T* grad_x, T* grad_offsets, Strips m, int64_t stride,
              int64_t begin, int64_t end) {
  const int64_t S = S_ ? S_ : m.C / m.G;
  std::vector<int32_t> left(m.G);
  std::vector<T> fraction(m.G), zeros(S), nowhere(S);
  for (int64_t strip = begin; strip < end; ++strip) {
    m.visit(strip, [&](int64_t at, int64_t first, int64_t step, int64_t position, int64_t n) {
      locate(offsets + at * stride, m.G, T(position), n, left.data(), fraction.data());
      const T* g_out = grad + at * m.C;
      for (int64_t g = 0; g < m.G; ++g) {
        const int64_t k = left[g];
        const T f = fraction[g];
        const bool has_near = k >= 0 && k < n, has_far = k >= -1 && k < n - 1;
        const int64_t near_at = (first + k * step) * m.C + g * S, far_at = near_at + step * m.C;
        const T* near = has_near ? x + near_at : zeros.data();
        const T* far = has_far ? x + far_at : zeros.data();
        T* to_near = has_near ? grad_x + near_at : nowhere.data();
        T* to_far = has_far ? grad_x + far_at : nowhere.data();
        T slope = 0;
        for (int64_t s = 0; s < S; ++s) {
          const T d = g_out[g * S + s];
          to_near[s] += d * (1 - f);
          to_far[s] += d * f;
          slope += d * (far[s] - near[s]);
        }
        grad_offsets[at * m.G + g] = slope;
      }
    });
  }
}

template <typename F>
void parallel(int64_t count, int threads, F&& work) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) work(count * t / threads, count * (t + 1) / threads);
}

template <typename T, int S>
void run_forward(const T* x, const T* o, T* y, Strips m, int64_t stride, int threads) {
  parallel(m.count(), threads, [&](int64_t a, int64_t b) { forward<T, S>(x, o, y, m, stride, a, b); });
}

template <typename T, int S>
void run_backward(const T* x, const T* o, const T* g, T* gx, T* go, Strips m, int64_t stride, int threads) {
  parallel(m.count(), threads, [&](int64_t a, int64_t b) { backward<T, S>(x, o, g, gx, go, m, stride, a, b); });
}

template <typename T>
void dispatch_forward(const T* x, const T* o, T* y, Strips m, int64_t stride, int threads) {
  switch (m.C / m.G) {
    case 1: return run_forward<T, 1>(x, o, y, m, stride, threads);
    case 2: return run_forward<T, 2>(x, o, y, m, stride, threads);
    case 4: return run_forward<T, 4>(x, o, y, m, stride, threads);
    case 8: return run_forward<T, 8>(x, o, y, m, stride, threads);
    default: return run_forward<T, 0>(x, o, y, m, stride, threads);
  }
}

template <typename T>
void dispatch_backward(const T* x, const T* o, const T* g, T* gx, T* go, Strips m, int64_t stride, int threads) {
  switch (m.C / m.G) {
    case 1: return run_backward<T, 1>(x, o, g, gx, go, m, stride, threads);
    case 2: return run_backward<T, 2>(x, o, g, gx, go, m, stride, threads);
    case 4: return run_backward<T, 4>(x, o, g, gx, go, m, stride, threads);
    case 8: return run_backward<T, 8>(x, o, g, gx, go, m, stride, threads);
    default: return run_backward<T, 0>(x, o, g, gx, go, m, stride, threads);
  }
}

Strips strips(int64_t B, int64_t H, int64_t W, int64_t C, int64_t G, int rows, int bytes) {
  const int64_t column = H * C * bytes;  // strips of columns of about 32 KiB
  const int64_t width = column >= 32768 ? 1 : 32768 / column;
  return {B, H, W, C, G, width, rows != 0};
}

}  // namespace

#define SIZES int64_t B, int64_t H, int64_t W, int64_t C, int64_t G, int64_t stride, int rows, int threads
#define EXPORT(T, suffix)                                                                                        \
  extern "C" void axial_sample_forward_##suffix(const T* x, const T* offsets, T* y, SIZES) {                     \
    dispatch_forward<T>(x, offsets, y, strips(B, H, W, C, G, rows, sizeof(T)), stride, threads);                 \
  }                                                                                                              \
  extern "C" void axial_sample_backward_##suffix(const T* x, const T* offsets, const T* grad, T* grad_x,         \
                                                 T* grad_offsets, SIZES) {                                       \
    std::memset(grad_x, 0, sizeof(T) * B * H * W * C);                                                           \
    dispatch_backward<T>(x, offsets, grad, grad_x, grad_offsets, strips(B, H, W, C, G, rows, sizeof(T)), stride, \
                         threads);                                                                               \
  }

EXPORT(float, float32)
EXPORT(double, float64)
