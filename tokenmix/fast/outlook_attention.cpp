// Outlook attention on the CPU: tokenmix/blocks/kernels/outlook_attention.py without unfolded windows.
//
// Logits are (B, h, w, heads, k*k, k*k), values (B, H, W, C), channels last; window (r, c) stands around the position
// (r * stride, c * stride). Every row of logits belongs to one place of one window, and so to one pixel: a row of the
// map collects from the rows of windows that cover it, and nothing is added up by two threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// exp of numbers that are not positive, to about one unit in the last place; NaN stays NaN. Cody and Waite's reduction,
// polynomial of Cephes.
inline float exponential(float x) {
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // rounded to a whole number in the last bits
  const float n = shifted - 12582912.0f;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4B400000 + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return x < -87.0f ? 0.0f : p * power;
}
inline double exponential(double x) { return std::exp(x); }

// Softmax of `rows` rows of n logits each.
template <typename T>
void softmax(const T* logits, T* weights, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = logits + i * n;
    T most = row[0];
    for (int64_t j = 1; j < n; ++j) most = row[j] > most ? row[j] : most;
    for (int64_t j = 0; j < n; ++j) weights[i * n + j] = row[j] - most;
  }
#pragma omp simd
  for (int64_t i = 0; i < rows * n; ++i) weights[i] = exponential(weights[i]);
  for (int64_t i = 0; i < rows; ++i) {
    T* row = weights + i * n;
    T sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += row[j];
    for (int64_t j = 0; j < n; ++j) row[j] /= sum;
  }
}

// y += the sum over i of weights[i] * rows[i], d numbers each.
template <typename T>
inline void mix(const T* const* rows, const T* weights, int64_t count, T* y, int64_t d) {
  constexpr int64_t N = 64 / sizeof(T);
  int64_t at = 0;
  for (; at + N <= d; at += N) {
    T sum[N];
    for (int64_t l = 0; l < N; ++l) sum[l] = y[at + l];
    for (int64_t i = 0; i < count; ++i) {
      const T weight = weights[i];
      const T* row = rows[i] + at;
      for (int64_t l = 0; l < N; ++l) sum[l] += weight * row[l];
    }
    for (int64_t l = 0; l < N; ++l) y[at + l] = sum[l];
  }
  for (; at < d; ++at) {
    T sum = y[at];
    for (int64_t i = 0; i < count; ++i) sum += weights[i] * rows[i][at];
    y[at] = sum;
  }
}

template <typename T>
inline T dot(const T* a, const T* b, int64_t d) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t l = 0; l < d; ++l) sum += a[l] * b[l];
  return sum;
}

struct Sizes {
  int64_t B, H, W, C, heads, k, stride;
  int64_t rows() const { return (H + stride - 1) / stride; }
  int64_t columns() const { return (W + stride - 1) / stride; }
  int64_t d() const { return C / heads; }

  // The places of window (r, c) that lie on the map: calls place(index in the window, position on the map).
  template <typename F>
  void places(int64_t r, int64_t c, F&& place) const {
    const int64_t p = k / 2;
    for (int64_t i = std::max<int64_t>(0, p - r * stride); i < std::min(k, H + p - r * stride); ++i)
      for (int64_t j = std::max<int64_t>(0, p - c * stride); j < std::min(k, W + p - c * stride); ++j)
        place(i * k + j, (r * stride + i - p) * W + c * stride + j - p);
  }
  // The rows of windows that cover row i of the map: from first to last.
  int64_t first(int64_t i) const { return std::max<int64_t>(0, (i - k / 2 + stride - 1) / stride); }
  int64_t last(int64_t i) const { return std::min(rows() - 1, (i + k / 2) / stride); }
};

template <typename F>
void parallel(int64_t count, int threads, F&& work) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) work(count * t / threads, count * (t + 1) / threads);
}

// Rows begin .. end of all maps. `weights` are logits' softmax, of which a row of the map takes those of its places
// (forward), or those of all places for its own (`TURNED`, the gradient of the values).
template <typename T, bool TURNED>
void collect(const T* given, const T* from, T* to, Sizes m, int64_t begin, int64_t end) {
  const int64_t kk = m.k * m.k, d = m.d(), p = m.k / 2;
  std::vector<T> own(m.k * kk), weights(kk);
  std::vector<const T*> rows(kk), shifted(kk);
  std::vector<int64_t> at(kk);
  for (int64_t line = begin; line < end; ++line) {
    const int64_t b = line / m.H, i = line % m.H;
    const T* source = from + b * m.H * m.W * m.C;
    T* out = to + line * m.W * m.C;
    std::fill(out, out + m.W * m.C, T(0));
    for (int64_t r = m.first(i); r <= m.last(i); ++r) {
      const int64_t y = i - r * m.stride + p;
      for (int64_t c = 0; c < m.columns(); ++c) {
        const T* window = given + ((b * m.rows() + r) * m.columns() + c) * m.heads * kk * kk;
        int64_t count = 0;
        m.places(r, c, [&](int64_t index, int64_t position) {
          at[count] = index;
          rows[count++] = source + position * m.C;
        });
        const int64_t left = std::max<int64_t>(0, p - c * m.stride), right = std::min(m.k, m.W + p - c * m.stride);
        for (int64_t head = 0; head < m.heads; ++head) {
          if (!TURNED) softmax(window + (head * kk + y * m.k) * kk, own.data(), m.k, kk);
          for (int64_t l = 0; l < count; ++l) shifted[l] = rows[l] + head * d;
          for (int64_t x = left; x < right; ++x) {
            const T* all = TURNED ? window + head * kk * kk + y * m.k + x : own.data() + x * kk;
            for (int64_t l = 0; l < count; ++l) weights[l] = all[TURNED ? at[l] * kk : at[l]];
            mix(shifted.data(), weights.data(), count, out + (c * m.stride + x - p) * m.C + head * d, d);
          }
        }
      }
    }
  }
}

// Weights of attention, and the gradient of the logits, of windows begin .. end.
template <typename T>
void slopes(const T* logits, const T* v, const T* grad, T* weights, T* grad_logits, Sizes m, int64_t begin,
            int64_t end) {
  const int64_t kk = m.k * m.k, d = m.d(), size = m.heads * kk * kk;
  std::vector<int64_t> at(kk), position(kk);
  for (int64_t window = begin; window < end; ++window) {
    const int64_t c = window % m.columns(), r = window / m.columns() % m.rows();
    const int64_t image = window / m.columns() / m.rows() * m.H * m.W;
    T *own = weights + window * size, *slope = grad_logits + window * size;
    softmax(logits + window * size, own, m.heads * kk, kk);
    std::fill(slope, slope + size, T(0));  // values outside of the map are zero
    int64_t count = 0;
    m.places(r, c, [&](int64_t index, int64_t where) {
      at[count] = index;
      position[count++] = (image + where) * m.C;
    });
    for (int64_t head = 0; head < m.heads; ++head)
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = (head * kk + at[i]) * kk;
        T mean = 0;
        for (int64_t j = 0; j < count; ++j) {
          const T value = dot(grad + position[i] + head * d, v + position[j] + head * d, d);
          slope[row + at[j]] = value;
          mean += own[row + at[j]] * value;
        }
        for (int64_t j = 0; j < kk; ++j) slope[row + j] = own[row + j] * (slope[row + j] - mean);
      }
  }
}

template <typename T>
void forward(const T* logits, const T* v, T* y, Sizes m, int threads) {
  parallel(m.B * m.H, threads, [&](int64_t a, int64_t b) { collect<T, false>(logits, v, y, m, a, b); });
}

template <typename T>
void backward(const T* logits, const T* v, const T* grad, T* weights, T* grad_logits, T* grad_v, Sizes m,
              int threads) {
  parallel(m.B * m.rows() * m.columns(), threads,
           [&](int64_t a, int64_t b) { slopes(logits, v, grad, weights, grad_logits, m, a, b); });
  parallel(m.B * m.H, threads, [&](int64_t a, int64_t b) { collect<T, true>(weights, grad, grad_v, m, a, b); });
}

}  // namespace

#define SIZES int64_t B, int64_t H, int64_t W, int64_t C, int64_t heads, int64_t kernel, int64_t stride, int threads
#define EXPORT(T, suffix)                                                                                         \
  extern "C" void outlook_attention_forward_##suffix(const T* logits, const T* v, T* y, SIZES) {                  \
    forward<T>(logits, v, y, {B, H, W, C, heads, kernel, stride}, threads);                                       \
  }                                                                                                               \
  extern "C" void outlook_attention_backward_##suffix(const T* logits, const T* v, const T* grad, T* weights,     \
                                                      T* grad_logits, T* grad_v, SIZES) {                         \
    backward<T>(logits, v, grad, weights, grad_logits, grad_v, {B, H, W, C, heads, kernel, stride}, threads);     \
  }

EXPORT(float, float32)
EXPORT(double, float64)
