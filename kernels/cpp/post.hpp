// mhc::post and its gradient: each token's rows are read once and written once.

extern "C" void mhc_post(const stream_t* X, const stream_t* F, const float* h_post,
                         const float* h_res, stream_t* Y, long tokens, long channels, int threads) {
  const bool streamed = far(Y, tokens, N * channels);
#pragma omp parallel num_threads(threads)
  {
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; ++t)
      write_streams(X + t * N * channels, F + t * channels, h_post + t * N,
                    MIXES ? h_res + t * N * N : nullptr, Y + t * N * channels, channels, streamed);
    finish_streams();
  }
}

extern "C" void mhc_post_backward(const stream_t* dY, const stream_t* X, const stream_t* F,
                                  const float* h_post, const float* h_res, stream_t* dX,
                                  stream_t* dF, float* dh_post, float* dh_res, long tokens,
                                  long channels, int threads) {
  const bool streamed = far(dX, tokens, N * channels);
#pragma omp parallel num_threads(threads)
  {
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; ++t) {
      vec dots[padded_to_vectors(N + N * N)] = {};
      write_streams_backward(dY + t * N * channels, X + t * N * channels, F + t * channels,
                             h_post + t * N, MIXES ? h_res + t * N * N : nullptr,
                             dX + t * N * channels, dF + t * channels, dots, channels, streamed);
      constexpr int COUNT = N + (MIXES ? N * N : 0);
      float sums[padded_to_vectors(COUNT)];
      for (int i = 0; i < COUNT; i += L) store(sums + i, lane_sums(dots + i));
      std::memcpy(dh_post + t * N, sums + COUNT - N, N * sizeof(float));
      if (MIXES) std::memcpy(dh_res + t * N * N, sums, N * N * sizeof(float));
    }
    finish_streams();
  }
}
