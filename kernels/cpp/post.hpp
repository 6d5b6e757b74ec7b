// mhc::post and its gradient: each token's rows are read once and written once.

// Where the mappings of a token stand; static ones are the same for all, and some have no matrix.
INLINE const float* token_post(const float* h_post, long t) {
  return h_post + (DYNAMIC ? t * GATES : 0) + GATES - N;
}
INLINE const float* token_res(const float* h_res, long t) {
  return !MIXES ? nullptr : DYNAMIC ? h_res + t * N * N : h_res;
}

extern "C" void mhc_post(const stream_t* X, const stream_t* F, const float* h_post,
                         const float* h_res, stream_t* Y, long tokens, long channels, int threads) {
  const long row = N * channels;
  const bool streamed = far(Y, tokens, row);
#pragma omp parallel num_threads(threads)
  {
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; ++t) {
      stream_t* const out = Y + t * row;
      write_streams(X + t * row, F + t * channels, token_post(h_post, t), token_res(h_res, t),
                    channels, streamed, [&](long c, auto at, int j, vec value) ALWAYS_INLINE {
                      at.put_far(out + j * channels + c, value);
                    });
    }
    finish_streams();
  }
}

constexpr int DOTS = N + (MIXES ? N * N : 0);  // gradients of H_res, row-major, then of H_post

// One token, from the gradient of its next state, whose rows stand g_stride apart.
template <typename G>
INLINE void write_token_backward(const G* g, long g_stride, const stream_t* x, const stream_t* f,
                                 const float* p, const float* r, stream_t* dx, stream_t* df,
                                 float* sums, long channels, bool streamed) {
  vec dots[padded_to_vectors(DOTS)] = {};
  write_streams_backward(g, g_stride, x, f, p, r, dx, df, dots, channels, streamed);
  for (int i = 0; i < DOTS; i += L) store(sums + i, lane_sums(dots + i));
}

INLINE void put_dots(const float* sums, float* dp, float* dr) {
  std::memcpy(dp + GATES - N, sums + DOTS - N, N * sizeof(float));
  if (MIXES) std::memcpy(dr, sums, N * N * sizeof(float));
}

extern "C" long mhc_post_backward_workspace(long channels, int threads) {
  const long sums = DYNAMIC ? 0 : DOTS * sizeof(double) / sizeof(float);
  return threads * (sums + padded_to_vectors(channels));
}

// Without dF that row is made for nobody, in the caches.
extern "C" void mhc_post_backward(const stream_t* dY, const stream_t* X, const stream_t* F,
                                  const float* h_post, const float* h_res, stream_t* dX,
                                  stream_t* dF, float* dh_post, float* dh_res, double* workspace,
                                  long tokens, long channels, int threads) {
  const long row = N * channels;
  const bool streamed = far(dX, tokens, row);
  float shared[DOTS];
#pragma omp parallel num_threads(threads)
  {
    double own[DOTS] = {};
    stream_t* const unread = (stream_t*)(workspace + (DYNAMIC ? 0 : threads * DOTS)) +
                             thread() * padded_to_vectors(channels);
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; ++t) {
      float sums[padded_to_vectors(DOTS)];
      write_token_backward(dY + t * row, channels, X + t * row, F + t * channels,
                           token_post(h_post, t), token_res(h_res, t), dX + t * row,
                           dF ? dF + t * channels : unread, sums, channels, streamed);
      if (DYNAMIC)
        put_dots(sums, dh_post + t * GATES, dh_res + (MIXES ? t * N * N : 0));
      else
        for (int i = 0; i < DOTS; ++i) own[i] += sums[i];
    }
    finish_streams();
    if (!DYNAMIC) sum_over_team(own, DOTS, workspace, shared);
  }
  if (!DYNAMIC) put_dots(shared, dh_post, dh_res);
}

// df alone: sum_i H_post[i] dX'_i.
extern "C" void mhc_post_backward_branch(const stream_t* dY, const float* h_post, stream_t* dF,
                                         long tokens, long channels, int threads) {
  const long row = N * channels;
#pragma omp parallel num_threads(threads)
  {
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; ++t) {
      const stream_t* const g = dY + t * row;
      const float* const p = token_post(h_post, t);
      for_channels(channels, false, [&](long c, auto at) ALWAYS_INLINE {
        vec df = p[0] * at.get_next(g + c, row);
        UNROLL for (int i = 1; i < N; ++i) df += p[i] * at.get_next(g + i * channels + c, row);
        at.put(dF + t * channels + c, df);
      });
    }
  }
}
