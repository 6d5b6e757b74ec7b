// Weighted sums of the streams whose weights are there already: mhc::collapse by a sum or a mean,
// mhc::read, and what a static mapping reads. WEIGHTS is how far the weights of two tokens lie apart,
// 0 where all share them.

static void collapse(const stream_t* X, stream_t* out, float divisor, long tokens, long channels,
                     int threads) {
#pragma omp parallel num_threads(threads)
  {
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; ++t)
      sum_streams(X + t * N * channels, divisor, out + t * channels, channels);
  }
}

extern "C" void mhc_mean(const stream_t* X, stream_t* out, long tokens, long channels,
                         int threads) {
  collapse(X, out, N, tokens, channels, threads);
}

extern "C" void mhc_sum(const stream_t* X, stream_t* out, long tokens, long channels, int threads) {
  collapse(X, out, 1, tokens, channels, threads);
}

extern "C" void mhc_read(const stream_t* X, const float* weights, stream_t* U, long tokens,
                         long channels, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; ++t)
      read_streams(X + t * N * channels, channels, weights + t * WEIGHTS, U + t * channels,
                   channels);
  }
}

extern "C" long mhc_read_backward_workspace(long, int threads) {
  return threads * N * sizeof(double) / sizeof(float);
}

extern "C" void mhc_read_backward(const stream_t* dU, const stream_t* X, const float* weights,
                                  stream_t* dX, float* dweights, double* workspace, long tokens,
                                  long channels, int threads) {
  const bool streamed = far(dX, tokens, N * channels);
#pragma omp parallel num_threads(threads)
  {
    double sums[N] = {};
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; ++t) {
      vec products[N] = {};
      for_channels(channels, streamed, [&](long c, auto at) ALWAYS_INLINE {
        const vec g = at.get(dU + t * channels + c);
        for (int j = 0; j < N; ++j) {
          const long here = (t * N + j) * channels + c;
          products[j] += g * at.get(X + here);
          at.put_far(dX + here, weights[t * WEIGHTS + j] * g);
        }
      });
      for (int j = 0; j < N; ++j)
        if (WEIGHTS)
          dweights[t * WEIGHTS + j] = sum(products[j]);
        else
          sums[j] += sum(products[j]);
    }
    finish_streams();
    if (!WEIGHTS) sum_over_team(sums, N, workspace, dweights);
  }
}
