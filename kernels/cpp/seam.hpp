// mhc::seam and its gradient: post of one site and pre of the next. A block of L tokens of the state
// between them stays in the caches; going back, it is made anew from the state before. Forward 2n + 2
// rows are read or written, backward 3n + 3. A norm of u changes none of this: u is rebuilt with that
// state.

// Without a norm of the branch input.
struct NoNorm {
  static constexpr bool APPLIES = false;
};

template <typename Norm>
static void seam(const stream_t* X, const stream_t* F, const float* h_post, const float* h_res,
                 const float* phi, const float* bias, const float* alpha, stream_t* Y, stream_t* U,
                 float* next_post, float* next_res, float* saved, Norm norm, float* workspace,
                 long tokens, long channels, int threads, int by_output) {
  const Sizes size(channels);
  const long row = N * channels;
#pragma omp parallel num_threads(threads)
  {
    pack<O>(phi, by_output, workspace, N / S, channels, size.padded);
    float* const y = workspace + size.phi + thread() * size.block;
    const Range range = share(tokens);
    const bool streamed = far(Y, tokens, row);
    for (long t = range.first; t < range.last; t += L) {
      const Block block(t, range.last);
      for (int i = 0; i < block.count; ++i) {
        stream_t* const out = Y + (t + i) * row;
        float* const kept = y + i * size.stride;
        write_streams(X + (t + i) * row, F + (t + i) * channels, token_post(h_post, t + i),
                      token_res(h_res, t + i), channels, streamed,
                      [&](long c, auto at, int j, vec value) ALWAYS_INLINE {
                        at.put_far(out + j * channels + c, value);
                        store(kept + j * size.padded + c, rounded<stream_t>(value));
                      });
      }
      clear_after(y, size.stride, block.count);
      Ahead ahead;
      block.look_ahead(ahead, F, channels);
      block.look_ahead(ahead, X, row);
      vec z[M], inverse[S], pre[N];
      const Rows rows{y, size.stride};
      project_block(size, rows, block.count, workspace, ahead, z, inverse);
      map_block(z, inverse, bias, alpha, block, {next_post, next_res, saved}, pre);
      take_given(h_post, block, pre);
      if constexpr (Norm::APPLIES) {
        for (int i = 0; i < block.count; ++i) {
          stream_t* const u = U + (t + i) * channels;
          read_token(size, rows, i, pre, u);
          norm.put(u, t + i, channels);
        }
      } else {
        read_block(size, rows, block, pre, U);
      }
    }
    finish_streams();
  }
}

// Either dphi or dz is null, as in `mhc_pre_backward`.
template <typename Norm>
static void seam_backward(const stream_t* dY, const stream_t* dU, const float* dnext_post,
                          const float* dnext_res, const stream_t* X, const stream_t* F,
                          const float* h_post, const float* h_res, const float* phi,
                          const float* bias, const float* alpha, const float* saved, stream_t* dX,
                          stream_t* dF, float* dh_post, float* dh_res, float* dphi, float* dbias,
                          float* dalpha, float* dz, Norm norm, float* workspace, long tokens,
                          long channels, int threads, int by_output) {
  const Sizes size(channels);
  const long row = N * channels;
  float* const packed = workspace;
  float* const phi_sums = packed + size.phi;
  float* const vector_sums = phi_sums + threads * size.phi;
  float* const copies = vector_sums + threads * size.sums;
#pragma omp parallel num_threads(threads)
  {
    pack<O>(phi, by_output, packed, N / S, channels, size.padded);
    float* const phi_sum = dphi ? phi_sums + thread() * size.phi : nullptr;
    if (phi_sum) std::memset(phi_sum, 0, size.phi * sizeof(float));
    float* const y = copies + thread() * (2 * size.block + L * size.padded);
    float *const g_copy = y + size.block, *const du_copy = g_copy + size.block;
    if constexpr (Norm::APPLIES) norm.begin(size, du_copy);
    Shared sums;
    const Range range = share(tokens);
    const bool streamed = far(dX, tokens, row);
    for (long t = range.first; t < range.last; t += L) {
      const Block block(t, range.last);
      const int count = block.count;
      const Rows g =
          staged(dY + t * row, g_copy, N, channels, size.padded, size.stride, count);
      Rows du{du_copy, size.padded};
      vec dots[N][L] = {}, pre[N];
      if constexpr (Norm::APPLIES)
        read_weights(saved, bias, alpha, block.first, count, pre);
      else
        du = staged(dU + t * channels, du_copy, 1, channels, size.padded, size.padded, count);
      for (int i = 0; i < count; ++i) {
        float* const kept = y + i * size.stride;
        const float* const du_row = du.at + i * du.stride;
        vec products[N] = {};
        write_streams(X + (t + i) * row, F + (t + i) * channels, token_post(h_post, t + i),
                      token_res(h_res, t + i), channels, false,
                      [&](long c, auto at, int j, vec value) ALWAYS_INLINE {
                        value = rounded<stream_t>(value);
                        store(kept + j * size.padded + c, value);
                        if (!Norm::APPLIES) products[j] += value * load(du_row + c);
                      });
        if constexpr (Norm::APPLIES) {
          norm.put_backward(dU + (t + i) * channels, {y, size.stride}, size, i, t + i, pre,
                            du_copy + i * size.padded);
          for (long c = 0; c < size.padded; c += L)
            UNROLL for (int j = 0; j < N; ++j)
              products[j] += load(kept + j * size.padded + c) * load(du_row + c);
        }
        for (int j = 0; j < N; ++j) dots[j][i] = products[j];
      }
      clear_after(y, size.stride, count);
      Through through;
      map_block_backward(size, dots, dnext_post, dnext_res, saved, bias, alpha, h_post, dh_post,
                         block, sums, through);
      if (dz) through.put(block, dz);
      Ahead ahead;
      block.look_ahead(ahead, dY, row);
      block.look_ahead(ahead, dU, channels);
      block.look_ahead(ahead, F, channels);
      block.look_ahead(ahead, X, row);
      // The gradient of the state between takes that state's place.
      state_block_backward<true>(size, {y, size.stride}, du, g, count, packed, through, phi_sum, y,
                                 size.stride, false, ahead);
      for (int i = 0; i < count; ++i) {
        float products[padded_to_vectors(DOTS)];
        const long token = t + i;
        write_token_backward(y + i * size.stride, size.padded, X + token * row,
                             F + token * channels, token_post(h_post, token),
                             token_res(h_res, token), dX + token * row, dF + token * channels,
                             products, channels, streamed);
        put_dots(products, dh_post + token * GATES, dh_res + (MIXES ? token * N * N : 0));
      }
    }
    finish_streams();
    share_gradients(size, sums, phi_sums, vector_sums, dphi, by_output, dbias, dalpha);
    if constexpr (Norm::APPLIES) norm.end(size);
  }
}
