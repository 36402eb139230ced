// One element of a solver's step, the same on the CPU and on a GPU. Needs to_float, from_float and
// HELIOS_DEVICE.

template <typename V>
HELIOS_DEVICE inline float velocity_at(const SolverStep& args, int64_t b, int64_t c, int64_t t,
                                       int64_t y, int64_t x) {
  if (args.velocity == nullptr) return 0.0f;
  const int64_t pt = args.patch[0], ph = args.patch[1], pw = args.patch[2];
  const int64_t rows = args.size[1] / ph, columns = args.size[2] / pw;
  const int64_t token = ((b * (args.size[0] / pt) + t / pt) * rows + y / ph) * columns + x / pw;
  const int64_t place = ((t % pt) * ph + y % ph) * pw + x % pw;
  return to_float(
      static_cast<const V*>(args.velocity)[(token * pt * ph * pw + place) * args.channels + c]);
}

template <typename V, typename L, typename O>
HELIOS_DEVICE inline void step_element(const SolverStep& args, int64_t i, float velocity) {
  const float x = to_float(static_cast<const L*>(args.latents)[i]);
  O* out = static_cast<O*>(args.out) + i;
  if (args.rule == SolverStep::Rule::kEuler) {
    *out = from_float<O>(x + static_cast<float>(args.scale) * velocity);
    return;
  }
  if (args.rule == SolverStep::Rule::kDmd) {
    const double exact = static_cast<double>(x) - args.sigma * static_cast<double>(velocity);
    const float x0 = to_float(from_double<V>(exact));
    if (args.start == nullptr) {
      *out = from_float<O>(x0);
      return;
    }
    const double start = static_cast<double>(to_float(static_cast<const O*>(args.start)[i]));
    *out = from_double<O>((1.0 - args.scale) * static_cast<double>(x0) + args.scale * start);
    return;
  }
  const float x0 = x - static_cast<float>(args.sigma) * velocity;
  float base = x;
  if (args.previous_base != nullptr) {
    base = args.previous_base[i] * args.correct_base;
    for (int k = 0; k < args.num_history; ++k) base += args.history[k][i] * args.correct[k];
    base += x0 * args.correct_current;
  }
  float following = base * args.predict_base + x0 * args.predict[0];
  for (int k = 0; k < args.num_history; ++k) following += args.history[k][i] * args.predict[k + 1];
  args.x0[i] = x0;
  args.base[i] = base;
  *out = from_float<O>(following);
}
