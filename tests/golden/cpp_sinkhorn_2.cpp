typedef float stream_t;
constexpr int N = 2;  // streams

// Site with constraint sinkhorn.
constexpr bool SITE = true, DYNAMIC = true;
constexpr int M = 8;  // logits: pre 2, post 2, res 4
constexpr int GROUPS = 3;  // scales of logits
constexpr int S = 1;  // norms, and projected rows, per token
constexpr int WORK = 12;  // stride of dz
constexpr bool MIXES = true;
constexpr int GATES = 2;  // numbers of a token in h_post: H_post
constexpr float NORM_EPS = 1e-06f;

INLINE vec bounded(vec hidden) { return hidden; }
INLINE vec bounded_backward(vec g, vec) { return g; }
// (17): H_pre = sigmoid(h).
INLINE vec pre_gate(vec h) { return sigmoid(h); }
INLINE vec pre_gate_backward(vec g, vec h) {
  const vec s = sigmoid(h);
  return g * (s * (1.0f - s));
}
// (18): H_post = 2 sigmoid(h).
INLINE vec post_gate(vec h) { return 2.0f * sigmoid(h); }
INLINE vec post_gate_backward(vec g, vec h) {
  const vec s = sigmoid(h);
  return g * (2.0f * s * (1.0f - s));
}

// (19): exp, then 20 times columns and rows divided by their sums.
INLINE void first_steps(const vec* h, vec* start, vec* divisors, vec* m) {
  vec top[2], column[2];
  top[0] = max(h[0], h[2]);
  start[0] = exp(h[0] - top[0]);
  start[2] = exp(h[2] - top[0]);
  column[0] = 1.0f / (start[0] + start[2]);
  start[0] *= column[0]; start[2] *= column[0];
  top[1] = max(h[1], h[3]);
  start[1] = exp(h[1] - top[1]);
  start[3] = exp(h[3] - top[1]);
  column[1] = 1.0f / (start[1] + start[3]);
  start[1] *= column[1]; start[3] *= column[1];
  // Relative to the row's maximum, too: a whole row may be far below its columns'.
  const vec high0 = max(h[0] - top[0], h[1] - top[1]);
  m[0] = exp(h[0] - top[0] - high0) * column[0];
  m[1] = exp(h[1] - top[1] - high0) * column[1];
  const vec high1 = max(h[2] - top[0], h[3] - top[1]);
  m[2] = exp(h[2] - top[0] - high1) * column[0];
  m[3] = exp(h[3] - top[1] - high1) * column[1];
  divisors[0] = m[0] + m[1];
  divisors[1] = m[2] + m[3];
  const vec inverse0 = 1.0f / divisors[0];
  m[0] *= inverse0; m[1] *= inverse0;
  const vec inverse1 = 1.0f / divisors[1];
  m[2] *= inverse1; m[3] *= inverse1;
}
INLINE void divide_columns(vec* m, vec* divisors) {
  divisors[0] = m[0] + m[2];
  divisors[1] = m[1] + m[3];
  const vec inverse0 = 1.0f / divisors[0];
  m[0] *= inverse0; m[2] *= inverse0;
  const vec inverse1 = 1.0f / divisors[1];
  m[1] *= inverse1; m[3] *= inverse1;
}
INLINE void divide_rows(vec* m, vec* divisors) {
  divisors[0] = m[0] + m[1];
  divisors[1] = m[2] + m[3];
  const vec inverse0 = 1.0f / divisors[0];
  m[0] *= inverse0; m[1] *= inverse0;
  const vec inverse1 = 1.0f / divisors[1];
  m[2] *= inverse1; m[3] *= inverse1;
}
INLINE void undo_columns(vec* g, vec* m, const vec* divisors) {
  const vec inverse0 = 1.0f / divisors[0];
  const vec dot0 = g[0] * m[0] + g[2] * m[2];
  g[0] = (g[0] - dot0) * inverse0;
  g[2] = (g[2] - dot0) * inverse0;
  m[0] *= divisors[0]; m[2] *= divisors[0];
  const vec inverse1 = 1.0f / divisors[1];
  const vec dot1 = g[1] * m[1] + g[3] * m[3];
  g[1] = (g[1] - dot1) * inverse1;
  g[3] = (g[3] - dot1) * inverse1;
  m[1] *= divisors[1]; m[3] *= divisors[1];
}
INLINE void undo_rows(vec* g, vec* m, const vec* divisors) {
  const vec inverse0 = 1.0f / divisors[0];
  const vec dot0 = g[0] * m[0] + g[1] * m[1];
  g[0] = (g[0] - dot0) * inverse0;
  g[1] = (g[1] - dot0) * inverse0;
  m[0] *= divisors[0]; m[1] *= divisors[0];
  const vec inverse1 = 1.0f / divisors[1];
  const vec dot1 = g[2] * m[2] + g[3] * m[3];
  g[2] = (g[2] - dot1) * inverse1;
  g[3] = (g[3] - dot1) * inverse1;
  m[2] *= divisors[1]; m[3] *= divisors[1];
}
INLINE void matrix(const vec* h, vec* out) {
  vec m[4], start[4], divisors[2];
  first_steps(h, start, divisors, m);
  for (int k = 1; k < 20; ++k) {
    divide_columns(m, divisors);
    divide_rows(m, divisors);
  }
  for (int i = 0; i < 4; ++i) out[i] = m[i];
}
INLINE void matrix_backward(const vec* dm, const vec* h, vec* dh) {
  vec m[4], g[4], start[4], divisors[2];
  vec by_column[20][2], by_row[20][2];
  first_steps(h, start, divisors, m);
  for (int k = 1; k < 20; ++k) {
    divide_columns(m, by_column[k]);
    divide_rows(m, by_row[k]);
  }
  for (int i = 0; i < 4; ++i) g[i] = dm[i];
  for (int k = 20 - 1; k > 0; --k) {
    undo_rows(g, m, by_row[k]);
    undo_columns(g, m, by_column[k]);
  }
  const vec dot0 = g[0] * m[0] + g[1] * m[1];
  g[0] = m[0] * (g[0] - dot0);
  g[1] = m[1] * (g[1] - dot0);
  const vec dot1 = g[2] * m[2] + g[3] * m[3];
  g[2] = m[2] * (g[2] - dot1);
  g[3] = m[3] * (g[3] - dot1);
  const vec sum0 = g[0] + g[2];
  dh[0] = g[0] - start[0] * sum0;
  dh[2] = g[2] - start[2] * sum0;
  const vec sum1 = g[1] + g[3];
  dh[1] = g[1] - start[1] * sum1;
  dh[3] = g[3] - start[3] * sum1;
}

// u = sum_i H_pre[i] X_i.
template <typename T>
INLINE void read_streams(const T* x, long padded, const float* w, stream_t* u, long channels) {
  for_channels(channels, false, [&](long c, auto at) ALWAYS_INLINE {
    at.put(u + c, w[0] * at.get(x + 0 * padded + c) + w[1] * at.get(x + 1 * padded + c));
  });
}

// X'_i = sum_j H_res[i, j] X_j + H_post[i] f, handed to `put`.
template <typename Put>
INLINE void write_streams(const stream_t* X, const stream_t* f, const float* p, const float* r, long channels, bool streamed, Put put) {
  for_channels(channels, streamed, [&](long c, auto at) ALWAYS_INLINE {
    const vec fc = at.get_next(f + c, channels);
    vec x[2];
    x[0] = at.get_next(X + 0 * channels + c, 2 * channels);
    x[1] = at.get_next(X + 1 * channels + c, 2 * channels);
    put(c, at, 0, r[0] * x[0] + r[1] * x[1] + p[0] * fc);
    put(c, at, 1, r[2] * x[0] + r[3] * x[1] + p[1] * fc);
  });
}

// dX_j = sum_i H_res[i, j] dX'_i; df = sum_i H_post[i] dX'_i; the products of dX'_i with X_j
// and f, whose sums over the channels are the gradients of H_res and H_post.
template <typename Grad>
INLINE void write_streams_backward(const Grad* G, long g_stride, const stream_t* X, const stream_t* f, const float* p, const float* r, stream_t* dx, stream_t* df, vec* dots, long channels, bool streamed) {
  for_channels(channels, streamed, [&](long c, auto at) ALWAYS_INLINE {
    const vec fc = at.get_next(f + c, channels);
    vec g[2];
    g[0] = at.get_next(G + 0 * g_stride + c, 2 * g_stride);
    g[1] = at.get_next(G + 1 * g_stride + c, 2 * g_stride);
    vec x[2];
    x[0] = at.get_next(X + 0 * channels + c, 2 * channels);
    x[1] = at.get_next(X + 1 * channels + c, 2 * channels);
    at.put_far(dx + 0 * channels + c, r[0] * g[0] + r[2] * g[1]);
    at.put_far(dx + 1 * channels + c, r[1] * g[0] + r[3] * g[1]);
    at.put(df + c, p[0] * g[0] + p[1] * g[1]);
    dots[0] += g[0] * x[0];
    dots[1] += g[0] * x[1];
    dots[4] += g[0] * fc;
    dots[2] += g[1] * x[0];
    dots[3] += g[1] * x[1];
    dots[5] += g[1] * fc;
  });
}
