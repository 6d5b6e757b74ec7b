typedef float stream_t;
constexpr int N = 2;  // streams

// Site with constraint none.
constexpr bool SITE = true, DYNAMIC = true;
constexpr int M = 8;  // logits: pre 2, post 2, res 4
constexpr int GROUPS = 3;  // scales of logits
constexpr int S = 2;  // norms, and projected rows, per token
constexpr int WORK = 12;  // stride of dz
constexpr bool MIXES = true;
constexpr int GATES = 2;  // numbers of a token in h_post: H_post
constexpr float NORM_EPS = 1e-06f;

// H = alpha tanh(z / r) + b, arXiv 2409.19606.
INLINE vec bounded(vec hidden) { return tanh(hidden); }
INLINE vec bounded_backward(vec g, vec bounded) { return g * (1.0f - bounded * bounded); }
INLINE vec pre_gate(vec h) { return h; }
INLINE vec pre_gate_backward(vec g, vec) { return g; }
INLINE vec post_gate(vec h) { return h; }
INLINE vec post_gate_backward(vec g, vec) { return g; }

// H_res = h.
INLINE void matrix(const vec* h, vec* out) { for (int i = 0; i < 4; ++i) out[i] = h[i]; }
INLINE void matrix_backward(const vec* g, const vec*, vec* dh) {
  for (int i = 0; i < 4; ++i) dh[i] = g[i];
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
