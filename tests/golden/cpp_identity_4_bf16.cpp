typedef bf16 stream_t;
constexpr int N = 4;  // streams

// Site with constraint identity.
constexpr bool SITE = true, DYNAMIC = true;
constexpr int M = 8;  // logits: pre 4, post 4, res 0
constexpr int GROUPS = 3;  // scales of logits
constexpr int S = 1;  // norms, and projected rows, per token
constexpr int WORK = 16;  // stride of dz
constexpr bool MIXES = false;
constexpr int GATES = 4;  // numbers of a token in h_post: H_post
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

// H_res = I.
INLINE void matrix(const vec*, vec*) {}
INLINE void matrix_backward(const vec*, const vec*, vec*) {}

// u = sum_i H_pre[i] X_i.
template <typename T>
INLINE void read_streams(const T* x, long padded, const float* w, stream_t* u, long channels) {
  for_channels(channels, false, [&](long c, auto at) ALWAYS_INLINE {
    at.put(u + c, w[0] * at.get(x + 0 * padded + c) + w[1] * at.get(x + 1 * padded + c) + w[2] * at.get(x + 2 * padded + c) + w[3] * at.get(x + 3 * padded + c));
  });
}

// X'_i = sum_j H_res[i, j] X_j + H_post[i] f, handed to `put`.
template <typename Put>
INLINE void write_streams(const stream_t* X, const stream_t* f, const float* p, const float* r, long channels, bool streamed, Put put) {
  for_channels(channels, streamed, [&](long c, auto at) ALWAYS_INLINE {
    const vec fc = at.get_next(f + c, channels);
    vec x[4];
    x[0] = at.get_next(X + 0 * channels + c, 4 * channels);
    x[1] = at.get_next(X + 1 * channels + c, 4 * channels);
    x[2] = at.get_next(X + 2 * channels + c, 4 * channels);
    x[3] = at.get_next(X + 3 * channels + c, 4 * channels);
    put(c, at, 0, x[0] + p[0] * fc);
    put(c, at, 1, x[1] + p[1] * fc);
    put(c, at, 2, x[2] + p[2] * fc);
    put(c, at, 3, x[3] + p[3] * fc);
  });
}

// dX_j = sum_i H_res[i, j] dX'_i; df = sum_i H_post[i] dX'_i; the products of dX'_i with X_j
// and f, whose sums over the channels are the gradients of H_res and H_post.
template <typename Grad>
INLINE void write_streams_backward(const Grad* G, long g_stride, const stream_t* X, const stream_t* f, const float* p, const float* r, stream_t* dx, stream_t* df, vec* dots, long channels, bool streamed) {
  for_channels(channels, streamed, [&](long c, auto at) ALWAYS_INLINE {
    const vec fc = at.get_next(f + c, channels);
    vec g[4];
    g[0] = at.get_next(G + 0 * g_stride + c, 4 * g_stride);
    g[1] = at.get_next(G + 1 * g_stride + c, 4 * g_stride);
    g[2] = at.get_next(G + 2 * g_stride + c, 4 * g_stride);
    g[3] = at.get_next(G + 3 * g_stride + c, 4 * g_stride);
    at.put_far(dx + 0 * channels + c, g[0]);
    at.put_far(dx + 1 * channels + c, g[1]);
    at.put_far(dx + 2 * channels + c, g[2]);
    at.put_far(dx + 3 * channels + c, g[3]);
    at.put(df + c, p[0] * g[0] + p[1] * g[1] + p[2] * g[2] + p[3] * g[3]);
    dots[0] += g[0] * fc;
    dots[1] += g[1] * fc;
    dots[2] += g[2] * fc;
    dots[3] += g[3] * fc;
  });
}
