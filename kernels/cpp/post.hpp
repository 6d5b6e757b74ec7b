// mhc::post and its gradient: each token's rows are read once and written once.

extern "C" void mhc_post(const stream_t* X, const stream_t* F, const float* h_post,
                         const float* h_res, stream_t* Y, long tokens, long channels, int threads) {
  const long row = N * channels;
  const bool streamed = far(Y, tokens, row);
#pragma omp parallel num_threads(threads)
  {
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; ++t) {
      stream_t* const out = Y + t * row;
      write_streams(X + t * row, F + t * channels, h_post + t * N,
                    MIXES ? h_res + t * N * N : nullptr, channels, streamed,
                    [&](long c, auto at, int j, vec value) ALWAYS_INLINE {
                      at.put_far(out + j * channels + c, value);
                    });
    }
    finish_streams();
  }
}

// One token, from the gradient of its next state, whose rows stand g_stride apart.
template <typename G>
INLINE void write_token_backward(const G* g, long g_stride, const stream_t* x, const stream_t* f,
                                 const float* p, const float* r, stream_t* dx, stream_t* df,
                                 float* dp, float* dr, long channels, bool streamed) {
  constexpr int COUNT = N + (MIXES ? N * N : 0);
  vec dots[padded_to_vectors(COUNT)] = {};
  write_streams_backward(g, g_stride, x, f, p, r, dx, df, dots, channels, streamed);
  float sums[padded_to_vectors(COUNT)];
  for (int i = 0; i < COUNT; i += L) store(sums + i, lane_sums(dots + i));
  std::memcpy(dp, sums + COUNT - N, N * sizeof(float));
  if (MIXES) std::memcpy(dr, sums, N * N * sizeof(float));
}

extern "C" void mhc_post_backward(const stream_t* dY, const stream_t* X, const stream_t* F,
                                  const float* h_post, const float* h_res, stream_t* dX,
                                  stream_t* dF, float* dh_post, float* dh_res, long tokens,
                                  long channels, int threads) {
  const long row = N * channels;
  const bool streamed = far(dX, tokens, row);
#pragma omp parallel num_threads(threads)
  {
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; ++t)
      write_token_backward(dY + t * row, channels, X + t * row, F + t * channels, h_post + t * N,
                           MIXES ? h_res + t * N * N : nullptr, dX + t * row, dF + t * channels,
                           dh_post + t * N, MIXES ? dh_res + t * N * N : nullptr, channels,
                           streamed);
    finish_streams();
  }
}
