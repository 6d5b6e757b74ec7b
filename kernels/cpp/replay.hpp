// mhc::replay: a token's streams go through all sites of a chunk in registers, with mappings that are
// known. Rows are read as mhc_seam and mhc_pre read them, and come out with the same bits.

extern "C" void mhc_replay(const stream_t* X, const Chunk* chunk, long tokens, long channels,
                           int threads) {
  const int posts = int(chunk->posts), reads = int(chunk->reads);
  const long row = N * channels;
  const bool streamed = posts && far(chunk->states[0], tokens, row);
#pragma omp parallel num_threads(threads)
  {
    Chunk at = *chunk;  // moves from token to token
    float weights[MOST_SITES + 1][L * N];
    const Range range = share(tokens);
    for (long t = range.first; t < range.last; t += L) {
      const int count = int(range.last - t < L ? range.last - t : L);
      for (int s = 0; s < reads; ++s) {
        vec pre[N];
        read_weights(chunk->saved[s], chunk->bias[s], chunk->alpha[s], t, count, pre);
        put_lanes<N>(weights[s], count, pre);  // token by token
      }
      for (int i = 0; i < count; ++i) {
        const long token = t + i;
        for (int s = 0; s < posts; ++s) {
          at.f[s] = chunk->f[s] + token * channels;
          at.h_post[s] = chunk->h_post[s] + token * N;
          at.h_res[s] = chunk->h_res[s] + token * (MIXES ? N * N : 0);
          at.states[s] = chunk->states[s] + token * row;
        }
        const float* w[MOST_SITES + 1];
        for (int s = 0; s < reads; ++s) {
          w[s] = weights[s] + i * N;
          at.inputs[s] = chunk->inputs[s] + token * channels;
        }
        replay_streams(X + token * row, at, w, channels, streamed);
      }
    }
    finish_streams();
  }
}
