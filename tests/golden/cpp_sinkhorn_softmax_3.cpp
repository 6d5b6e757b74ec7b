typedef float stream_t;
constexpr int N = 3;  // streams

// Site with constraint sinkhorn_softmax.
constexpr bool SITE = true, DYNAMIC = true;
constexpr int M = 15;  // logits: pre 3, post 3, res 9
constexpr int GROUPS = 3;  // scales of logits
constexpr int S = 1;  // norms, and projected rows, per token
constexpr int WORK = 20;  // stride of dz
constexpr bool MIXES = true;
constexpr int GATES = 3;  // numbers of a token in h_post: H_post
constexpr float NORM_EPS = 1e-06f;

INLINE vec bounded(vec hidden) { return hidden; }
INLINE vec bounded_backward(vec g, vec) { return g; }
// (17): H_pre = sigmoid(h).
INLINE vec pre_gate(vec h) { return sigmoid(h) + 1e-06f; }
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

// (19): exp, then 5 times columns and rows divided by their sums.
INLINE void first_steps(const vec* h, vec* start, vec* divisors, vec* m) {
  vec top[3], column[3];
  top[0] = max(h[0], max(h[3], h[6]));
  start[0] = exp(h[0] - top[0]);
  start[3] = exp(h[3] - top[0]);
  start[6] = exp(h[6] - top[0]);
  column[0] = 1.0f / (start[0] + start[3] + start[6]);
  start[0] *= column[0]; start[3] *= column[0]; start[6] *= column[0];
  top[1] = max(h[1], max(h[4], h[7]));
  start[1] = exp(h[1] - top[1]);
  start[4] = exp(h[4] - top[1]);
  start[7] = exp(h[7] - top[1]);
  column[1] = 1.0f / (start[1] + start[4] + start[7]);
  start[1] *= column[1]; start[4] *= column[1]; start[7] *= column[1];
  top[2] = max(h[2], max(h[5], h[8]));
  start[2] = exp(h[2] - top[2]);
  start[5] = exp(h[5] - top[2]);
  start[8] = exp(h[8] - top[2]);
  column[2] = 1.0f / (start[2] + start[5] + start[8]);
  start[2] *= column[2]; start[5] *= column[2]; start[8] *= column[2];
  m[0] = start[0] + 1e-06f;
  m[1] = start[1] + 1e-06f;
  m[2] = start[2] + 1e-06f;
  m[3] = start[3] + 1e-06f;
  m[4] = start[4] + 1e-06f;
  m[5] = start[5] + 1e-06f;
  m[6] = start[6] + 1e-06f;
  m[7] = start[7] + 1e-06f;
  m[8] = start[8] + 1e-06f;
  divisors[0] = m[0] + m[1] + m[2] + 1e-06f;
  divisors[1] = m[3] + m[4] + m[5] + 1e-06f;
  divisors[2] = m[6] + m[7] + m[8] + 1e-06f;
  const vec inverse0 = 1.0f / divisors[0];
  m[0] *= inverse0; m[1] *= inverse0; m[2] *= inverse0;
  const vec inverse1 = 1.0f / divisors[1];
  m[3] *= inverse1; m[4] *= inverse1; m[5] *= inverse1;
  const vec inverse2 = 1.0f / divisors[2];
  m[6] *= inverse2; m[7] *= inverse2; m[8] *= inverse2;
}
INLINE void divide_columns(vec* m, vec* divisors) {
  divisors[0] = m[0] + m[3] + m[6] + 1e-06f;
  divisors[1] = m[1] + m[4] + m[7] + 1e-06f;
  divisors[2] = m[2] + m[5] + m[8] + 1e-06f;
  const vec inverse0 = 1.0f / divisors[0];
  m[0] *= inverse0; m[3] *= inverse0; m[6] *= inverse0;
  const vec inverse1 = 1.0f / divisors[1];
  m[1] *= inverse1; m[4] *= inverse1; m[7] *= inverse1;
  const vec inverse2 = 1.0f / divisors[2];
  m[2] *= inverse2; m[5] *= inverse2; m[8] *= inverse2;
}
INLINE void divide_rows(vec* m, vec* divisors) {
  divisors[0] = m[0] + m[1] + m[2] + 1e-06f;
  divisors[1] = m[3] + m[4] + m[5] + 1e-06f;
  divisors[2] = m[6] + m[7] + m[8] + 1e-06f;
  const vec inverse0 = 1.0f / divisors[0];
  m[0] *= inverse0; m[1] *= inverse0; m[2] *= inverse0;
  const vec inverse1 = 1.0f / divisors[1];
  m[3] *= inverse1; m[4] *= inverse1; m[5] *= inverse1;
  const vec inverse2 = 1.0f / divisors[2];
  m[6] *= inverse2; m[7] *= inverse2; m[8] *= inverse2;
}
INLINE void undo_columns(vec* g, vec* m, const vec* divisors) {
  const vec inverse0 = 1.0f / divisors[0];
  const vec dot0 = g[0] * m[0] + g[3] * m[3] + g[6] * m[6];
  g[0] = (g[0] - dot0) * inverse0;
  g[3] = (g[3] - dot0) * inverse0;
  g[6] = (g[6] - dot0) * inverse0;
  m[0] *= divisors[0]; m[3] *= divisors[0]; m[6] *= divisors[0];
  const vec inverse1 = 1.0f / divisors[1];
  const vec dot1 = g[1] * m[1] + g[4] * m[4] + g[7] * m[7];
  g[1] = (g[1] - dot1) * inverse1;
  g[4] = (g[4] - dot1) * inverse1;
  g[7] = (g[7] - dot1) * inverse1;
  m[1] *= divisors[1]; m[4] *= divisors[1]; m[7] *= divisors[1];
  const vec inverse2 = 1.0f / divisors[2];
  const vec dot2 = g[2] * m[2] + g[5] * m[5] + g[8] * m[8];
  g[2] = (g[2] - dot2) * inverse2;
  g[5] = (g[5] - dot2) * inverse2;
  g[8] = (g[8] - dot2) * inverse2;
  m[2] *= divisors[2]; m[5] *= divisors[2]; m[8] *= divisors[2];
}
INLINE void undo_rows(vec* g, vec* m, const vec* divisors) {
  const vec inverse0 = 1.0f / divisors[0];
  const vec dot0 = g[0] * m[0] + g[1] * m[1] + g[2] * m[2];
  g[0] = (g[0] - dot0) * inverse0;
  g[1] = (g[1] - dot0) * inverse0;
  g[2] = (g[2] - dot0) * inverse0;
  m[0] *= divisors[0]; m[1] *= divisors[0]; m[2] *= divisors[0];
  const vec inverse1 = 1.0f / divisors[1];
  const vec dot1 = g[3] * m[3] + g[4] * m[4] + g[5] * m[5];
  g[3] = (g[3] - dot1) * inverse1;
  g[4] = (g[4] - dot1) * inverse1;
  g[5] = (g[5] - dot1) * inverse1;
  m[3] *= divisors[1]; m[4] *= divisors[1]; m[5] *= divisors[1];
  const vec inverse2 = 1.0f / divisors[2];
  const vec dot2 = g[6] * m[6] + g[7] * m[7] + g[8] * m[8];
  g[6] = (g[6] - dot2) * inverse2;
  g[7] = (g[7] - dot2) * inverse2;
  g[8] = (g[8] - dot2) * inverse2;
  m[6] *= divisors[2]; m[7] *= divisors[2]; m[8] *= divisors[2];
}
INLINE void matrix(const vec* h, vec* out) {
  vec m[9], start[9], divisors[3];
  first_steps(h, start, divisors, m);
  for (int k = 1; k < 5; ++k) {
    divide_columns(m, divisors);
    divide_rows(m, divisors);
  }
  for (int i = 0; i < 9; ++i) out[i] = m[i];
}
INLINE void matrix_backward(const vec* dm, const vec* h, vec* dh) {
  vec m[9], g[9], start[9], divisors[3];
  vec by_column[5][3], by_row[5][3];
  first_steps(h, start, divisors, m);
  for (int k = 1; k < 5; ++k) {
    divide_columns(m, by_column[k]);
    divide_rows(m, by_row[k]);
  }
  for (int i = 0; i < 9; ++i) g[i] = dm[i];
  for (int k = 5 - 1; k > 0; --k) {
    undo_rows(g, m, by_row[k]);
    undo_columns(g, m, by_column[k]);
  }
  const vec dot0 = g[0] * m[0] + g[1] * m[1] + g[2] * m[2];
  g[0] = (g[0] - dot0) / divisors[0];
  g[1] = (g[1] - dot0) / divisors[0];
  g[2] = (g[2] - dot0) / divisors[0];
  const vec dot1 = g[3] * m[3] + g[4] * m[4] + g[5] * m[5];
  g[3] = (g[3] - dot1) / divisors[1];
  g[4] = (g[4] - dot1) / divisors[1];
  g[5] = (g[5] - dot1) / divisors[1];
  const vec dot2 = g[6] * m[6] + g[7] * m[7] + g[8] * m[8];
  g[6] = (g[6] - dot2) / divisors[2];
  g[7] = (g[7] - dot2) / divisors[2];
  g[8] = (g[8] - dot2) / divisors[2];
  const vec sum0 = g[0] * start[0] + g[3] * start[3] + g[6] * start[6];
  dh[0] = start[0] * (g[0] - sum0);
  dh[3] = start[3] * (g[3] - sum0);
  dh[6] = start[6] * (g[6] - sum0);
  const vec sum1 = g[1] * start[1] + g[4] * start[4] + g[7] * start[7];
  dh[1] = start[1] * (g[1] - sum1);
  dh[4] = start[4] * (g[4] - sum1);
  dh[7] = start[7] * (g[7] - sum1);
  const vec sum2 = g[2] * start[2] + g[5] * start[5] + g[8] * start[8];
  dh[2] = start[2] * (g[2] - sum2);
  dh[5] = start[5] * (g[5] - sum2);
  dh[8] = start[8] * (g[8] - sum2);
}

// u = sum_i H_pre[i] X_i.
template <typename T>
INLINE void read_streams(const T* x, long padded, const float* w, stream_t* u, long channels) {
  for_channels(channels, false, [&](long c, auto at) ALWAYS_INLINE {
    at.put(u + c, w[0] * at.get(x + 0 * padded + c) + w[1] * at.get(x + 1 * padded + c) + w[2] * at.get(x + 2 * padded + c));
  });
}

// X'_i = sum_j H_res[i, j] X_j + H_post[i] f, handed to `put`.
template <typename Put>
INLINE void write_streams(const stream_t* X, const stream_t* f, const float* p, const float* r, long channels, bool streamed, Put put) {
  for_channels(channels, streamed, [&](long c, auto at) ALWAYS_INLINE {
    const vec fc = at.get_next(f + c, channels);
    vec x[3];
    x[0] = at.get_next(X + 0 * channels + c, 3 * channels);
    x[1] = at.get_next(X + 1 * channels + c, 3 * channels);
    x[2] = at.get_next(X + 2 * channels + c, 3 * channels);
    put(c, at, 0, r[0] * x[0] + r[1] * x[1] + r[2] * x[2] + p[0] * fc);
    put(c, at, 1, r[3] * x[0] + r[4] * x[1] + r[5] * x[2] + p[1] * fc);
    put(c, at, 2, r[6] * x[0] + r[7] * x[1] + r[8] * x[2] + p[2] * fc);
  });
}

// dX_j = sum_i H_res[i, j] dX'_i; df = sum_i H_post[i] dX'_i; the products of dX'_i with X_j
// and f, whose sums over the channels are the gradients of H_res and H_post.
template <typename Grad>
INLINE void write_streams_backward(const Grad* G, long g_stride, const stream_t* X, const stream_t* f, const float* p, const float* r, stream_t* dx, stream_t* df, vec* dots, long channels, bool streamed) {
  for_channels(channels, streamed, [&](long c, auto at) ALWAYS_INLINE {
    const vec fc = at.get_next(f + c, channels);
    vec g[3];
    g[0] = at.get_next(G + 0 * g_stride + c, 3 * g_stride);
    g[1] = at.get_next(G + 1 * g_stride + c, 3 * g_stride);
    g[2] = at.get_next(G + 2 * g_stride + c, 3 * g_stride);
    vec x[3];
    x[0] = at.get_next(X + 0 * channels + c, 3 * channels);
    x[1] = at.get_next(X + 1 * channels + c, 3 * channels);
    x[2] = at.get_next(X + 2 * channels + c, 3 * channels);
    at.put_far(dx + 0 * channels + c, r[0] * g[0] + r[3] * g[1] + r[6] * g[2]);
    at.put_far(dx + 1 * channels + c, r[1] * g[0] + r[4] * g[1] + r[7] * g[2]);
    at.put_far(dx + 2 * channels + c, r[2] * g[0] + r[5] * g[1] + r[8] * g[2]);
    at.put(df + c, p[0] * g[0] + p[1] * g[1] + p[2] * g[2]);
    dots[0] += g[0] * x[0];
    dots[1] += g[0] * x[1];
    dots[2] += g[0] * x[2];
    dots[9] += g[0] * fc;
    dots[3] += g[1] * x[0];
    dots[4] += g[1] * x[1];
    dots[5] += g[1] * x[2];
    dots[10] += g[1] * fc;
    dots[6] += g[2] * x[0];
    dots[7] += g[2] * x[1];
    dots[8] += g[2] * x[2];
    dots[11] += g[2] * fc;
  });
}
