// mhc::pre and its gradient. Blocks of L tokens stay in the caches from the projection to the
// pre-mix.

extern "C" long mhc_pre_workspace(long channels, int threads) {
  const Sizes size(channels);
  return size.phi + threads * size.block;
}

extern "C" void mhc_pre(const stream_t* X, const float* phi, const float* bias, const float* alpha,
                        const float* gates, stream_t* U, float* h_post, float* h_res, float* saved,
                        float* workspace, long tokens, long channels, int threads,
                        int by_output) {
  const Sizes size(channels);
#pragma omp parallel num_threads(threads)
  {
    pack<O>(phi, by_output, workspace, N / S, channels, size.padded);
    float* copy = workspace + size.phi + thread() * size.block;
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; t += L) {
      const Block block(t, range.last);
      const Rows x = staged(X + t * N * channels, copy, N, channels, size.padded, size.stride,
                            block.count);
      Ahead ahead;
      block.look_ahead(ahead, X, N * channels);
      vec z[M], inverse[S], pre[N];
      project_block(size, x, block.count, workspace, ahead, z, inverse);
      map_block(z, inverse, bias, alpha, block, {h_post, h_res, saved}, pre);
      take_given(gates, block, pre);
      read_block(size, x, block, pre, U);
    }
  }
}

extern "C" long mhc_pre_backward_workspace(long channels, int threads) {
  const Sizes size(channels);
  return size.phi + threads * (size.phi + size.sums + 2 * size.block + L * size.padded);
}

// Either dphi or dz is null: `mhc_phi_backward` makes the one from the other.
extern "C" void mhc_pre_backward(const stream_t* dU, const float* dh_post, const float* dh_res,
                                 const stream_t* X, const stream_t* dX_more, const float* phi,
                                 const float* bias, const float* alpha, const float* saved,
                                 const float* gates, stream_t* dX, float* dphi, float* dbias,
                                 float* dalpha, float* dz, float* dgates, float* workspace,
                                 long tokens, long channels, int threads, int by_output) {
  const Sizes size(channels);
  float* const packed = workspace;
  float* const phi_sums = packed + size.phi;
  float* const vector_sums = phi_sums + threads * size.phi;
  float* const copies = vector_sums + threads * size.sums;
#pragma omp parallel num_threads(threads)
  {
    pack<O>(phi, by_output, packed, N / S, channels, size.padded);
    float* const phi_sum = dphi ? phi_sums + thread() * size.phi : nullptr;
    if (phi_sum) std::memset(phi_sum, 0, size.phi * sizeof(float));
    float* const x = copies + thread() * (2 * size.block + L * size.padded);
    float *const more_copy = x + size.block, *const du_copy = more_copy + size.block;
    Shared sums;
    const Range range = share(tokens);
    const bool streamed = far(dX, tokens, N * channels);
    for (long t = range.first; t < range.last; t += L) {
      const Block block(t, range.last);
      const int count = block.count;
      const Rows du =
          staged(dU + t * channels, du_copy, 1, channels, size.padded, size.padded, count);
      vec dots[N][L] = {};
      for (int i = 0; i < count; ++i) {
        vec products[N] = {};
        for_channels(channels, false, [&](long c, auto at) ALWAYS_INLINE {
          const vec g = load(du.at + i * du.stride + c);
          UNROLL for (int j = 0; j < N; ++j) {
            const vec value = at.get(X + ((t + i) * N + j) * channels + c);
            store(x + i * size.stride + j * size.padded + c, value);
            products[j] += g * value;
          }
        });
        for (int j = 0; j < N; ++j) dots[j][i] = products[j];
      }
      clear_after(x, size.stride, count);
      Through through;
      map_block_backward(size, dots, dh_post, dh_res, saved, bias, alpha, gates, dgates, block,
                         sums, through);
      if (dz) through.put(block, dz);
      const bool direct = in_place<stream_t>(channels, count);
      float* const dx = direct ? (float*)(dX + t * N * channels) : x;
      const long dx_stride = direct ? N * channels : size.stride;
      Ahead ahead;
      block.look_ahead(ahead, dU, channels);
      block.look_ahead(ahead, X, N * channels);
      const Rows rows{x, size.stride};
      if (dX_more) {
        block.look_ahead(ahead, dX_more, N * channels);
        const Rows more = staged(dX_more + t * N * channels, more_copy, N, channels, size.padded,
                                 size.stride, count);
        state_block_backward<true>(size, rows, du, more, count, packed, through, phi_sum, dx,
                                   dx_stride, direct && streamed, ahead);
      } else {
        state_block_backward<false>(size, rows, du, rows, count, packed, through, phi_sum, dx,
                                    dx_stride, direct && streamed, ahead);
      }
      if (!direct)
        for (int i = 0; i < count; ++i)
          for (int j = 0; j < N; ++j)
            for_channels(channels, false, [&](long c, auto at) ALWAYS_INLINE {
              at.put(dX + ((t + i) * N + j) * channels + c,
                     load(x + i * size.stride + j * size.padded + c));
            });
    }
    finish_streams();
    share_gradients(size, sums, phi_sums, vector_sums, dphi, by_output, dbias, dalpha);
  }
}
