// mhc::collapse by a sum or a mean. (Its gradient, and mhc::expand, only copy.)

extern "C" void mhc_collapse(const stream_t* X, stream_t* out, float divisor, long tokens,
                             long channels, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; ++t)
      sum_streams(X + t * N * channels, divisor, out + t * channels, channels);
  }
}
