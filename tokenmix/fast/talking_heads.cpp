// Attention whose heads talk to each other, on the CPU: tokenmix/blocks/kernels/talking_heads.py without its maps.
//
// A plain C interface. Scores and weights exist for one vector of query rows at a time, laid out (heads, keys, rows), so
// that a softmax over the keys works on whole vectors, and mixing the heads of all pairs is a product of a small matrix
// with a wide one. The backward pass computes the weights again; images do not depend on each other, so gradients add up
// in a fixed order. A last block of few rows takes shorter vectors.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

namespace {

// L numbers; where the processor's vectors are shorter, the compiler takes several.
template <typename T, int L>
struct Vector {
  typedef T type __attribute__((vector_size(L * sizeof(T)), aligned(sizeof(T)), may_alias));
};

template <typename T, int L>
using V = typename Vector<T, L>::type;

template <typename T>
constexpr int lanes = 64 / sizeof(T);

template <int L, typename T>
inline V<T, L> load(const T* at) {
  return *reinterpret_cast<const V<T, L>*>(at);
}

template <int L, typename T>
inline void store(T* at, V<T, L> value) {
  *reinterpret_cast<V<T, L>*>(at) = value;
}

constexpr int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

// A matrix that is only read: element (i, j) at i * rows + j * columns.
template <typename T>
struct View {
  const T* at;
  int64_t rows, columns;
};

template <typename T, int L, int R, int C>
inline void tile(T* y, int64_t y_row, View<T> w, const T* x, int64_t x_row, int64_t K, const T* bias, bool add) {
  V<T, L> sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = add ? load<L>(y + r * y_row + c * L) : V<T, L>{} + (bias ? bias[r] : T(0));
  for (int64_t k = 0; k < K; ++k) {
    V<T, L> right[C];
    for (int c = 0; c < C; ++c) right[c] = load<L>(x + k * x_row + c * L);
    for (int r = 0; r < R; ++r) {
      const T left = w.at[r * w.rows + k * w.columns];
      for (int c = 0; c < C; ++c) sum[r][c] += left * right[c];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store<L>(y + r * y_row + c * L, sum[r][c]);
}

template <typename T, int L, int C>
inline void strip(T* y, int64_t y_row, View<T> w, const T* x, int64_t x_row, int64_t R, int64_t K, const T* bias,
                  bool add) {
  constexpr int most = C == 4 ? 4 : 8;  // rows: sums enough to keep the processor busy, and no more than it holds
  int64_t r = 0;
  const auto rows = [&] { return View<T>{w.at + r * w.rows, w.rows, w.columns}; };
  const auto its_bias = [&] { return bias ? bias + r : nullptr; };
  for (; r + most <= R; r += most) tile<T, L, most, C>(y + r * y_row, y_row, rows(), x, x_row, K, its_bias(), add);
  for (; r + 2 <= R; r += 2) tile<T, L, 2, C>(y + r * y_row, y_row, rows(), x, x_row, K, its_bias(), add);
  for (; r < R; ++r) tile<T, L, 1, C>(y + r * y_row, y_row, rows(), x, x_row, K, its_bias(), add);
}

// y (R, P) = w (R, K) x (K, P) + bias (R), or added to y. P is whole vectors; rows of y and x have lengths of their own.
template <int L, typename T>
void product(T* y, int64_t y_row, View<T> w, const T* x, int64_t x_row, int64_t R, int64_t K, int64_t P,
             const T* bias = nullptr, bool add = false) {
  int64_t p = 0;
  for (; p + 4 * L <= P; p += 4 * L) strip<T, L, 4>(y + p, y_row, w, x + p, x_row, R, K, bias, add);
  for (; p + 2 * L <= P; p += 2 * L) strip<T, L, 2>(y + p, y_row, w, x + p, x_row, R, K, bias, add);
  for (; p < P; p += L) strip<T, L, 1>(y + p, y_row, w, x + p, x_row, R, K, bias, add);
}

// y (R, P) += w (R, K) x (K, P).
template <int L, typename T>
void add_product(T* y, int64_t y_row, View<T> w, const T* x, int64_t x_row, int64_t R, int64_t K, int64_t P) {
  product<L>(y, y_row, w, x, x_row, R, K, P, static_cast<const T*>(nullptr), true);
}

// The sum of a vector's numbers, half added to half.
template <typename T, int L>
inline T total(V<T, L> x) {
  if constexpr (L == 1) {
    return x[0];
  } else {
    V<T, L / 2> halves[2];
    std::memcpy(halves, &x, sizeof x);
    return total<T, L / 2>(halves[0] + halves[1]);
  }
}

template <typename T, int L, int R, int C>
inline void inner_tile(T* y, int64_t y_row, const T* a, const T* b, int64_t P) {
  V<T, L> sum[R][C] = {};
  for (int64_t p = 0; p < P; p += L) {
    V<T, L> right[C];
    for (int c = 0; c < C; ++c) right[c] = load<L>(b + c * P + p);
    for (int r = 0; r < R; ++r) {
      const V<T, L> left = load<L>(a + r * P + p);
      for (int c = 0; c < C; ++c) sum[r][c] += left * right[c];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) y[r * y_row + c] += total<T, L>(sum[r][c]);
}

// y (R, C) += a (R, P) b (C, P)^T.
template <int L, typename T>
void inner(T* y, const T* a, const T* b, int64_t R, int64_t C, int64_t P) {
  int64_t r = 0;
  for (; r + 4 <= R; r += 4) {
    int64_t c = 0;
    for (; c + 4 <= C; c += 4) inner_tile<T, L, 4, 4>(y + r * C + c, C, a + r * P, b + c * P, P);
    for (; c < C; ++c) inner_tile<T, L, 4, 1>(y + r * C + c, C, a + r * P, b + c * P, P);
  }
  for (; r < R; ++r)
    for (int64_t c = 0; c < C; ++c) inner_tile<T, L, 1, 1>(y + r * C + c, C, a + r * P, b + c * P, P);
}

// exp to about one unit in the last place: 2**n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes). For numbers up to
// zero; NaN stays NaN.
template <int L>
inline V<float, L> exponential(V<float, L> x, float) {
  typedef int32_t Int __attribute__((vector_size(L * 4)));
  const V<float, L> low = V<float, L>{} - 87.3f, magic = V<float, L>{} + 12582912.0f;
  const V<float, L> bounded = x < low ? low : x;
  const V<float, L> shifted = bounded * 1.44269504088896341f + magic;  // its last bits are those of n
  const V<float, L> n = shifted - magic;
  const V<float, L> r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  V<float, L> p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Int power = ((Int)shifted << 23) + (127 << 23);
  const V<float, L> y = p * (V<float, L>)power;
  return x < low ? V<float, L>{} : y;
}

template <int L>
inline V<double, L> exponential(V<double, L> x, double) {
  V<double, L> y;
  for (int i = 0; i < L; ++i) y[i] = std::exp(x[i]);
  return y;
}

// Softmax over M vectors, number by number.
template <int L, typename T>
void softmax(T* x, int64_t M) {
  V<T, L> most = load<L>(x);
  for (int64_t j = 1; j < M; ++j) {
    const V<T, L> next = load<L>(x + j * L);
    most = next > most ? next : most;
  }
  V<T, L> sum = {};
  for (int64_t j = 0; j < M; ++j) {
    const V<T, L> e = exponential<L>(load<L>(x + j * L) - most, T());
    store<L>(x + j * L, e);
    sum += e;
  }
  const V<T, L> scale = T(1) / sum;
  for (int64_t j = 0; j < M; ++j) store<L>(x + j * L, load<L>(x + j * L) * scale);
}

// Memory of a thread that is kept from call to call, cut into parts; what they hold at first is undefined.
template <typename T>
std::vector<T*> workspace(std::initializer_list<int64_t> sizes) {
  thread_local std::vector<T> memory;
  int64_t need = 0;
  for (int64_t size : sizes) need += size;
  if (int64_t(memory.size()) < need) {
    memory.clear();
    memory.resize(need);
  }
  std::vector<T*> parts;
  T* at = memory.data();
  for (int64_t size : sizes) {
    parts.push_back(at);
    at += size;
  }
  return parts;
}

template <typename T>
struct Attention {
  const T *q, *k, *v;
  const T *logit_mixing, *logit_bias, *weight_mixing, *weight_bias;
  int64_t B, N, M, h, g, d, e;  // e channels of a head's values
  int64_t q_image, q_row, k_image, k_row, v_image, v_row;

  T scale() const { return T(1) / std::sqrt(T(d)); }
  int64_t D() const { return whole(d, lanes<T>); }
  int64_t E() const { return whole(e, lanes<T>); }
  int64_t blocks() const { return (N + lanes<T> - 1) / lanes<T>; }
};

// The heads of an image's tokens, (h, count, width) with rows of whole vectors: as they lie, or copied and padded.
template <typename T>
struct Heads {
  const T* at;
  int64_t head, row;

  Heads(T* room, const T* x, int64_t x_row, int64_t h, int64_t d, int64_t count) : at(x), head(d), row(x_row) {
    const int64_t wide = whole(d, lanes<T>);
    if (d == wide) return;
    std::memset(room, 0, sizeof(T) * h * count * wide);
    for (int64_t i = 0; i < h; ++i)
      for (int64_t j = 0; j < count; ++j)
        std::memcpy(room + (i * count + j) * wide, x + j * x_row + i * d, sizeof(T) * d);
    at = room;
    head = count * wide;
    row = wide;
  }
};

// (channels, L): rows of tokens with a scale, channel by channel. Behind the last one stands it again, or zero.
template <int L, typename T>
void across(T* y, const T* x, int64_t row, int64_t channels, int64_t rows, T scale, bool repeat) {
  for (int r = 0; r < L; ++r) {
    const T* from = x + std::min<int64_t>(r, rows - 1) * row;
    const T factor = r < rows || repeat ? scale : T(0);
    for (int64_t c = 0; c < channels; ++c) y[c * L + r] = factor == T(0) ? T(0) : from[c] * factor;
  }
}

// Scores (h, M, L) of a block of queries, and the softmax (g, M, L) of what mixing makes of them.
template <int L, typename T>
void weigh(const Attention<T>& a, const T* q, const T* k, int64_t rows, T* queries, T* scores, T* inner_weights) {
  const int64_t S = a.M * L;
  across<L>(queries, q, a.q_row, a.h * a.d, rows, a.scale(), true);
  for (int64_t i = 0; i < a.h; ++i)
    product<L>(scores + i * S, L, {k + i * a.d, a.k_row, 1}, queries + i * a.d * L, L, a.M, a.d, L);
  product<L>(inner_weights, S, {a.logit_mixing, a.h, 1}, scores, S, a.g, a.h, S, a.logit_bias);
  for (int64_t i = 0; i < a.g; ++i) softmax<L>(inner_weights + i * S, a.M);
}

// The block of queries from `first` on, of one image.
template <int L, typename T>
void forward_block(const Attention<T>& a, int64_t image, int64_t first, int64_t rows, const Heads<T>& v, T* y,
                   const std::vector<T*>& room) {
  T *queries = room[0], *scores = room[1], *inner_weights = room[2], *out = room[3], *weights = scores;
  const int64_t S = a.M * L, E = a.E();
  weigh<L>(a, a.q + image * a.q_image + first * a.q_row, a.k + image * a.k_image, rows, queries, scores,
           inner_weights);
  product<L>(weights, S, {a.weight_mixing, a.g, 1}, inner_weights, S, a.h, a.g, S, a.weight_bias);
  for (int64_t i = 0; i < a.h; ++i) {
    product<lanes<T>>(out, E, {weights + i * S, 1, L}, v.at + i * v.head, v.row, rows, a.M, E);
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(y + ((image * a.N + first + r) * a.h + i) * a.e, out + r * E, sizeof(T) * a.e);
  }
}

template <typename T>
void forward(const Attention<T>& a, T* y, int threads) {
  constexpr int L = lanes<T>;
  const int64_t tasks = a.B * a.blocks(), parts = std::min<int64_t>(threads, tasks);
#pragma omp parallel for num_threads(parts) schedule(static) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) {
    const auto room = workspace<T>({a.h * a.d * L, a.h * a.M * L, a.g * a.M * L, L * a.E(), a.h * a.M * a.E()});
    for (int64_t task = tasks * part / parts; task < tasks * (part + 1) / parts; ++task) {
      const int64_t image = task / a.blocks(), first = task % a.blocks() * L, rows = std::min<int64_t>(L, a.N - first);
      const Heads<T> v(room[4], a.v + image * a.v_image, a.v_row, a.h, a.e, a.M);
      if (2 * rows > L)
        forward_block<L>(a, image, first, rows, v, y, room);
      else
        forward_block<L / 2>(a, image, first, rows, v, y, room);
    }
  }
}

// What the gradients of an image add up to: of the maps, and of keys and values, (h, M, D) and (h, M, E).
template <typename T>
struct Sums {
  T *to_logits, *to_weights, *to_bias, *k, *v;
};

template <int L, typename T>
void backward_block(const Attention<T>& a, int64_t image, int64_t first, int64_t rows, const Heads<T>& k,
                    const T* grad, T* grad_q, Sums<T> sums, const std::vector<T*>& room) {
  T *across_rows = room[0], *scores = room[1], *inner_weights = room[2], *out = room[3], *weights = room[4],
    *slopes = room[5], *inner_slopes = room[6];
  const int64_t S = a.M * L, D = a.D(), E = a.E();
  const T* q = a.q + image * a.q_image + first * a.q_row;
  const T* v = a.v + image * a.v_image;
  const T* g = grad + (image * a.N + first) * a.h * a.e;
  weigh<L>(a, q, a.k + image * a.k_image, rows, across_rows, scores, inner_weights);
  product<L>(weights, S, {a.weight_mixing, a.g, 1}, inner_weights, S, a.h, a.g, S, a.weight_bias);
  // Of the weights, dA = dO v^T, and of the values, dv += A^T dO.
  across<L>(across_rows, g, a.h * a.e, a.h * a.e, rows, T(1), false);
  const Heads<T> grads(room[7], g, a.h * a.e, a.h, a.e, rows);
  for (int64_t i = 0; i < a.h; ++i) {
    product<L>(slopes + i * S, L, {v + i * a.e, a.v_row, 1}, across_rows + i * a.e * L, L, a.M, a.e, L);
    add_product<lanes<T>>(sums.v + i * a.M * E, E, {weights + i * S, L, 1}, grads.at + i * grads.head, grads.row, a.M,
                          rows, E);
  }
  inner<L>(sums.to_weights, slopes, inner_weights, a.h, a.g, S);
  for (int64_t i = 0; i < a.h; ++i) {
    V<T, L> sum = {};
    for (int64_t j = 0; j < a.M; ++j) sum += load<L>(slopes + i * S + j * L);
    sums.to_bias[i] += total<T, L>(sum);
  }
  // Back through the map and the softmax: dL = W (dW - sum over keys of W dW).
  product<L>(inner_slopes, S, {a.weight_mixing, 1, a.g}, slopes, S, a.g, a.h, S);
  for (int64_t i = 0; i < a.g; ++i) {
    T *w = inner_weights + i * S, *s = inner_slopes + i * S;
    V<T, L> mean = {};
    for (int64_t j = 0; j < a.M; ++j) mean += load<L>(w + j * L) * load<L>(s + j * L);
    for (int64_t j = 0; j < a.M; ++j) store<L>(s + j * L, load<L>(w + j * L) * (load<L>(s + j * L) - mean));
  }
  inner<L>(sums.to_logits, inner_slopes, scores, a.g, a.h, S);
  product<L>(slopes, S, {a.logit_mixing, 1, a.h}, inner_slopes, S, a.h, a.g, S);
  const Heads<T> queries(room[8], q, a.q_row, a.h, a.d, rows);
  for (int64_t i = 0; i < a.h; ++i) {
    product<lanes<T>>(out, D, {slopes + i * S, 1, L}, k.at + i * k.head, k.row, rows, a.M, D);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < a.d; ++c)
        grad_q[((image * a.N + first + r) * a.h + i) * a.d + c] = out[r * D + c] * a.scale();
    add_product<lanes<T>>(sums.k + i * a.M * D, D, {slopes + i * S, L, 1}, queries.at + i * queries.head, queries.row,
                          a.M, rows, D);
  }
}

// Gradients of q (B, N, C), k (B, M, C) and v (B, M, C'), and image by image those of the maps: logit_mixing,
// weight_mixing, weight_bias. (That of logit_bias is zero: a softmax does not see what all keys have in common.)
template <typename T>
void backward(const Attention<T>& a, const T* grad, T* grad_q, T* grad_k, T* grad_v, T* grad_maps, int threads) {
  constexpr int L = lanes<T>;
  const int64_t D = a.D(), E = a.E(), maps = a.g * a.h, parts = std::min<int64_t>(threads, a.B);
#pragma omp parallel for num_threads(parts) schedule(static) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) {
    const auto room = workspace<T>({a.h * std::max(a.d, a.e) * L, a.h * a.M * L, a.g * a.M * L, L * std::max(D, E),
                                    a.h * a.M * L, a.h * a.M * L, a.g * a.M * L, a.h * L * E, a.h * L * D,
                                    a.h * a.M * D, a.h * a.M * D, a.h * a.M * E});
    for (int64_t image = a.B * part / parts; image < a.B * (part + 1) / parts; ++image) {
      T* to_logits = grad_maps + image * (2 * maps + a.h);
      const Sums<T> sums = {to_logits, to_logits + maps, to_logits + 2 * maps, room[10], room[11]};
      std::fill_n(to_logits, 2 * maps + a.h, T(0));
      std::fill_n(sums.k, a.h * a.M * D, T(0));
      std::fill_n(sums.v, a.h * a.M * E, T(0));
      const Heads<T> k(room[9], a.k + image * a.k_image, a.k_row, a.h, a.d, a.M);
      for (int64_t first = 0; first < a.N; first += L) {
        const int64_t rows = std::min<int64_t>(L, a.N - first);
        if (2 * rows > L)
          backward_block<L>(a, image, first, rows, k, grad, grad_q, sums, room);
        else
          backward_block<L / 2>(a, image, first, rows, k, grad, grad_q, sums, room);
      }
      for (int64_t j = 0; j < a.M; ++j)
        for (int64_t i = 0; i < a.h; ++i) {
          T* to_k = grad_k + ((image * a.M + j) * a.h + i) * a.d;
          for (int64_t c = 0; c < a.d; ++c) to_k[c] = sums.k[(i * a.M + j) * D + c] * a.scale();
          std::memcpy(grad_v + ((image * a.M + j) * a.h + i) * a.e, sums.v + (i * a.M + j) * E, sizeof(T) * a.e);
        }
    }
  }
}

}  // namespace

#define INPUTS(T)                                                                                                     \
  const T *q, const T *k, const T *v, const T *logit_mixing, const T *logit_bias, const T *weight_mixing,             \
      const T *weight_bias
#define SIZES                                                                                                         \
  int64_t B, int64_t N, int64_t M, int64_t h, int64_t g, int64_t d, int64_t e, int64_t q_image, int64_t q_row,        \
      int64_t k_image, int64_t k_row, int64_t v_image, int64_t v_row
#define ATTENTION                                                                                                     \
  {q, k, v, logit_mixing, logit_bias, weight_mixing, weight_bias, B, N, M, h, g, d, e, q_image, q_row, k_image,       \
   k_row, v_image, v_row}
#define EXPORT(T, suffix)                                                                                             \
  extern "C" void talking_heads_forward_##suffix(INPUTS(T), T* y, SIZES, int threads) {                               \
    forward<T>(ATTENTION, y, threads);                                                                                \
  }                                                                                                                   \
  extern "C" void talking_heads_backward_##suffix(INPUTS(T), const T* grad, T* grad_q, T* grad_k, T* grad_v,          \
                                                  T* grad_maps, SIZES, int threads) {                                 \
    backward<T>(ATTENTION, grad, grad_q, grad_k, grad_v, grad_maps, threads);                                         \
  }

EXPORT(float, float32)
EXPORT(double, float64)
