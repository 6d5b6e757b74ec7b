// (17): H_pre of tokens from t on, a block of them, from what was saved of their projections.
INLINE void read_weights(const float* saved, const float* bias, const float* alpha, long t,
                         int count, vec* pre) {
  const float* const from = saved + t * (M + S);
  vec z[N], inverse[S];
  get_lanes<N>(from, count, z, M + S);
  get_lanes<S>(from + M, count, inverse, M + S);
  for (int i = 0; i < N; ++i)
    pre[i] = pre_gate(alpha[0] * bounded(z[i] * inverse[i % S]) + bias[i]);
}
