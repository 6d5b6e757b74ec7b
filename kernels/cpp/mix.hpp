// mhc::mix: what of mhc::post needs no branch output, with the same bits.

extern "C" void mhc_mix(const stream_t* X, const float* h_res, stream_t* M, long tokens,
                        long channels, int threads) {
  const long row = N * channels;
  const bool streamed = far(M, tokens, row);
#pragma omp parallel num_threads(threads)
  {
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; ++t)
      mix_streams(X + t * row, h_res + (DYNAMIC ? t * N * N : 0), M + t * row, channels, streamed);
    finish_streams();
  }
}
