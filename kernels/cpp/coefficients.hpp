// The mappings of a site for blocks of L tokens, each coefficient a vector over them: equations (16)
// to (19) from the projection, and back.

constexpr int O = M / S;  // outputs of one projected row: a token, or one stream of it

struct Sizes {
  long channels, padded, stride, width, phi, block, sums;
  MEMBER explicit Sizes(long c)
      : channels(c), padded(padded_to_vectors(c)), stride(N * padded + 32),
        width(N / S * padded),
        phi(width * O), block(L * stride), sums((M + 3) * L) {}
};

// The tokens of a block, and those of the next one.
struct Block {
  long first;
  int count;
  long next, after;
  MEMBER Block(long t, long last)
      : first(t), count(int(last - t < L ? last - t : L)), next(t + L),
        after(last < t + 2 * L ? last : t + 2 * L) {}
  template <typename T> MEMBER void look_ahead(Ahead& to, const T* rows, long row) const {
    to.add(rows + next * row, rows + after * row);
  }
};

// The group of a logit, with a scale of its own: pre, post, res.
INLINE int group(int m) { return m < N ? 0 : m < 2 * N ? 1 : 2; }

// (14), (15): z and 1/r of a block whose rows stand in x.
INLINE void project_block(const Sizes& size, Rows x, int count, const float* packed,
                          Ahead& ahead, vec* z, vec* inverse) {
  for (int s = 0; s < S; ++s) {
    vec square;
    project<O>(x.at + s * size.width, x.stride, size.width, count, packed, ahead, z + s, S,
               &square);
    inverse[s] = 1.0f / sqrt(square / float(N / S * size.channels) + NORM_EPS);
  }
}

// What the mappings of a block are written to.
struct Mappings {
  float *h_post, *h_res, *saved;
};

// (16) to (19); returns H_pre in `pre`.
static void map_block(const vec* z, const vec* inverse, const float* bias, const float* alpha,
                      const Block& block, const Mappings& to, vec* pre) {
  const long t = block.first;
  const int count = block.count;
  vec h[M], post[N], res[N * N];
  for (int m = 0; m < M; ++m)
    h[m] = alpha[group(m)] * bounded(z[m] * inverse[m % S]) + bias[m];  // (16)
  for (int i = 0; i < N; ++i) pre[i] = pre_gate(h[i]);                  // (17)
  if (SITE) {
    for (int i = 0; i < N; ++i) post[i] = post_gate(h[N + i]);  // (18)
    put_lanes<N>(to.h_post + t * GATES + GATES - N, count, post, GATES);
    if (GATES > N) put_lanes<N>(to.h_post + t * GATES, count, pre, GATES);
  }
  if (MIXES) {
    matrix(h + 2 * N, res);  // (19)
    put_lanes<N * N>(to.h_res + t * N * N, count, res);
  }
  put_lanes<M>(to.saved + t * (M + S), count, z, M + S);
  put_lanes<S>(to.saved + t * (M + S) + M, count, inverse, M + S);
}

// In a single pass H_pre is that of the site before, in front of its H_post.
INLINE void take_given(const float* gates, const Block& block, vec* pre) {
  if (GATES > N) get_lanes<N>(gates + block.first * GATES, block.count, pre, GATES);
}

// u of token i of a block.
INLINE void read_token(const Sizes& size, Rows x, int i, const vec* pre, stream_t* u) {
  float weights[N];
  for (int j = 0; j < N; ++j) weights[j] = pre[j][i];
  read_streams(x.at + i * x.stride, size.padded, weights, u, size.channels);
}

// u of the tokens of a block.
static void read_block(const Sizes& size, Rows x, const Block& block, const vec* pre,
                       stream_t* U) {
  for (int i = 0; i < block.count; ++i)
    read_token(size, x, i, pre, U + (block.first + i) * size.channels);
}

// The gradients that the mappings of all tokens have in common, as far as one thread has them.
struct Shared {
  vec bias[M] = {}, alpha[3] = {};
};

// What a mapping passes on to the gradient of its state.
struct Through {
  float dz[S][L * O];  // the gradient of z, by row of the projection and output
  vec shrink[S];       // the factor of the state itself, by the norm
  vec pre[N];          // H_pre, the factor of du

  // The gradients of z of a block, as `phi_rows` reads them.
  MEMBER void put(const Block& block, float* rows) const {
    for (int i = 0; i < block.count; ++i)
      for (int m = 0; m < M; ++m)
        rows[(block.first + i) * WORK + m] = dz[m % S][i * O + m / S];
  }
};

// `dots` are the products of du with the streams, channels in the lanes still: the gradient of H_pre,
// which in a single pass came in `gates` and goes to `dgates`.
static void map_block_backward(const Sizes& size, vec (*dots)[L], const float* dh_post,
                               const float* dh_res, const float* saved, const float* bias,
                               const float* alpha, const float* gates, float* dgates,
                               const Block& block, Shared& sums, Through& to) {
  const long t = block.first;
  const int count = block.count;
  vec z[M], inverse[S], hidden[M], h[M], dh[M];
  get_lanes<M>(saved + t * (M + S), count, z, M + S);
  get_lanes<S>(saved + t * (M + S) + M, count, inverse, M + S);
  for (int m = 0; m < M; ++m) {
    hidden[m] = bounded(z[m] * inverse[m % S]);
    h[m] = alpha[group(m)] * hidden[m] + bias[m];
  }
  vec g_pre[N];
  for (int i = 0; i < N; ++i) {
    to.pre[i] = pre_gate(h[i]);
    g_pre[i] = lane_sums(dots[i]);
  }
  if (GATES > N) {
    take_given(gates, block, to.pre);
    put_lanes<N>(dgates + t * GATES, count, g_pre, GATES);
    get_lanes<N>(dh_post + t * GATES, count, g_pre, GATES);
  }
  for (int i = 0; i < N; ++i) dh[i] = pre_gate_backward(g_pre[i], h[i]);
  if (SITE) {
    vec g_post[N];
    get_lanes<N>(dh_post + t * GATES + GATES - N, count, g_post, GATES);
    for (int i = 0; i < N; ++i) dh[N + i] = post_gate_backward(g_post[i], h[N + i]);
  }
  if (MIXES) {
    vec g_res[N * N];
    get_lanes<N * N>(dh_res + t * N * N, count, g_res);
    matrix_backward(g_res, h + 2 * N, dh + 2 * N);
  }

  // Through (16) and the division by the norm: d(1/r)/dx = -(1/r)^3 x / (values of one norm).
  for (int s = 0; s < S; ++s) to.shrink[s] = vec{};
  for (int m = 0; m < M; ++m) {
    sums.bias[m] += dh[m];
    sums.alpha[group(m)] += dh[m] * hidden[m];
    const vec g = bounded_backward(dh[m] * alpha[group(m)], hidden[m]);
    to.shrink[m % S] -= g * z[m];
    const vec dz = g * inverse[m % S];
    for (int i = 0; i < L; ++i) to.dz[m % S][i * O + m / S] = dz[i];
  }
  for (int s = 0; s < S; ++s)
    to.shrink[s] *= inverse[s] * inverse[s] * inverse[s] / float(N / S * size.channels);
}

// dphi of a block (unless there is no `phi_sum`), and the gradient of its state into `dx`: through
// the mappings, through u, and what came by other ways (`more`). `dx` may be `x`.
template <bool MORE>
static void state_block_backward(const Sizes& size, Rows x, Rows du, Rows more, int count,
                                 const float* packed, const Through& through, float* phi_sum,
                                 float* dx, long dx_stride, bool streamed, Ahead& ahead) {
  for (int j = 0; j < N; ++j) {
    const int s = S == 1 ? 0 : j;
    const long from = S == 1 ? j * size.padded : 0;  // where stream j begins in phi
    auto step = [&](long c, auto columns) {
      constexpr int V = decltype(columns)::value;
      const long at = j * size.padded + c, in_phi = (from + c) * O;
      const float *const dz = through.dz[s], *const rows = x.at + at;
      if (phi_sum) add_phi_gradient<V, O>(rows, x.stride, count, dz, phi_sum + in_phi, ahead);
      state_gradient<V, O, MORE>({rows, x.stride}, {du.at + c, du.stride},
                                 {more.at + at, more.stride}, count, packed + in_phi, dz,
                                 through.shrink[s], through.pre[j], dx + at, dx_stride, streamed,
                                 !phi_sum, ahead);
    };
    long c = 0;
    for (; c + COLS * L <= size.padded; c += COLS * L) step(c, Columns<COLS>());
    for (; c < size.padded; c += L) step(c, Columns<1>());
  }
}

// The gradients of phi, bias and alpha from those of all threads, in their order; to be called by
// all threads of a team.
static void share_gradients(const Sizes& size, const Shared& own, const float* phi_sums,
                            float* vector_sums, float* dphi, bool by_output, float* dbias,
                            float* dalpha) {
  float* const to = vector_sums + thread() * size.sums;
  for (int m = 0; m < M; ++m) store(to + m * L, own.bias[m]);
  for (int i = 0; i < 3; ++i) store(to + (M + i) * L, own.alpha[i]);
#pragma omp barrier
  if (dphi)
    unpack_sum<O>(phi_sums, size.phi, team(), dphi, by_output, N / S, size.channels, size.padded);
#pragma omp single
  for (int m = 0; m < M + GROUPS; ++m) {
    vec total = {};
    for (int b = 0; b < team(); ++b) total += load(vector_sums + b * size.sums + m * L);
    (m < M ? dbias + m : dalpha + m - M)[0] = sum(total);
  }
}
