// The gradient of phi from that of z, for a backward that left it for later: the same sums in the
// same order as there. With F, the state that was projected is made again from the one before it.
extern "C" long mhc_phi_backward_workspace(long channels, int threads) {
  const Sizes size(channels);
  return threads * (size.phi + size.block);
}

extern "C" void mhc_phi_backward(const float* dz, const stream_t* X, const stream_t* F,
                                 const float* h_post, const float* h_res, float* dphi,
                                 float* workspace, long tokens, long channels, int threads,
                                 int by_output) {
  const Sizes size(channels);
  const long row = N * channels;
#pragma omp parallel num_threads(threads)
  {
    float* const phi_sum = workspace + thread() * size.phi;
    std::memset(phi_sum, 0, size.phi * sizeof(float));
    float* const copy = workspace + threads * size.phi + thread() * size.block;
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; t += L) {
      const Block block(t, range.last);
      Rows x{copy, size.stride};
      if (F)
        for (int i = 0; i < block.count; ++i)
          write_streams(X + (t + i) * row, F + (t + i) * channels, token_post(h_post, t + i),
                        token_res(h_res, t + i), channels, false,
                        [&](long c, auto, int j, vec value) ALWAYS_INLINE {
                          store(copy + i * size.stride + j * size.padded + c,
                                rounded<stream_t>(value));
                        });
      else
        x = staged(X + t * row, copy, N, channels, size.padded, size.stride, block.count);
      float rows[S][L * O];
      for (int i = 0; i < block.count; ++i)
        for (int m = 0; m < M; ++m) rows[m % S][i * O + m / S] = dz[(t + i) * WORK + m];
      Ahead ahead;
      if (F) block.look_ahead(ahead, F, channels);
      block.look_ahead(ahead, X, row);
      for (int j = 0; j < N; ++j) {
        const float *const from = x.at + j * size.padded, *const products = rows[S == 1 ? 0 : j];
        float* const to = phi_sum + (S == 1 ? j * size.padded * O : 0);
        long c = 0;
        for (; c + COLS * L <= size.padded; c += COLS * L)
          add_phi_gradient<COLS, O>(from + c, x.stride, block.count, products, to + c * O, ahead);
        for (; c < size.padded; c += L)
          add_phi_gradient<1, O>(from + c, x.stride, block.count, products, to + c * O, ahead);
      }
    }
#pragma omp barrier
    unpack_sum<O>(workspace, size.phi, team(), dphi, by_output, N / S, channels, size.padded);
  }
}
