// One element of a solver's step, the same on the CPU and on a GPU. Needs to_float, from_float and
// HELIOS_DEVICE.

template <typename V>
HELIOS_DEVICE inline float velocity_at(const SolverStep& args, int64_t b, int64_t c, int64_t t,
                                       int64_t y, int64_t x) {
  const int64_t pt = args.patch[0], ph = args.patch[1], pw = args.patch[2];
  const int64_t rows = args.size[1] / ph, columns = args.size[2] / pw;
  const int64_t token = ((b * (args.size[0] / pt) + t / pt) * rows + y / ph) * columns + x / pw;
  const int64_t place = ((t % pt) * ph + y % ph) * pw + x % pw;
  return to_float(
      static_cast<const V*>(args.velocity)[(token * pt * ph * pw + place) * args.channels + c]);
}

template <typename V, typename L>
HELIOS_DEVICE inline void step_element(const SolverStep& args, int64_t index, int64_t i,
                                       float velocity) {
  L* latents = static_cast<L*>(args.latents) + i;
  const float x = to_float(*latents);
  if (args.rule == SolverStep::Rule::kEuler) {
    *latents = from_float<L>(x + static_cast<float>(args.coefficients[index]) * velocity);
    return;
  }
  if (args.rule == SolverStep::Rule::kDmd) {
    const double sigma = args.coefficients[2 * index], next = args.coefficients[2 * index + 1];
    const double exact = static_cast<double>(x) - sigma * static_cast<double>(velocity);
    const float x0 = to_float(from_double<V>(exact));
    if (next == 0.0) {
      *latents = from_float<L>(x0);
      return;
    }
    const double start = static_cast<double>(to_float(static_cast<const L*>(args.start)[i]));
    *latents = from_double<L>((1.0 - next) * static_cast<double>(x0) + next * start);
    return;
  }
  const int kept = args.kept;
  const int64_t elements = args.batch * args.channels * args.size[0] * args.size[1] * args.size[2];
  const double* row = args.coefficients + index * (6 + 2 * kept);
  const double *correct = row + 2, *predict = row + 4 + kept;
  const float x0 = x - static_cast<float>(row[0]) * velocity;
  const bool corrects = row[1] != 0.0;
  float base = corrects ? args.base[i] * static_cast<float>(correct[0]) : x;
  for (int k = 0; corrects && k < kept; ++k) {
    const float older = args.history[(index + kept - 1 - k) % kept * elements + i];
    base += older * static_cast<float>(correct[2 + k]);
  }
  if (corrects) base += x0 * static_cast<float>(correct[1]);
  float following = base * static_cast<float>(predict[0]) + x0 * static_cast<float>(predict[1]);
  for (int k = 0; k < kept; ++k) {
    const float older = args.history[(index + kept - 1 - k) % kept * elements + i];
    following += older * static_cast<float>(predict[2 + k]);
  }
  args.history[index % kept * elements + i] = x0;
  args.base[i] = base;
  *latents = from_float<L>(following);
}
