/* fill of deft_tvm/plan/fill.py: where to cut each group, and the seconds of what is so cut. */
#include <string.h>

#include "native.h"

static const double SLACK = 1.02;
static const double SHARES[] = {0.5, 0.75, 0.9, 1.0, 2.0, 3.0, 4.0, 8.0};

typedef struct {
  const Prices *prices;
  const Groups *groups;
  Price *units, *one_class, *scratch; /* [groups] */
} Uncut;

static double seconds_of(const Uncut *uncut, const int64_t *chunk) {
  int64_t partials = 0;
  for (int32_t g = 0; g < uncut->groups->count; ++g) {
    int64_t rows = group_rows(uncut->groups, g);
    int64_t pieces = ceil_div(uncut->groups->tokens[g], chunk[g]);
    uncut->units[g] = units_of(uncut->prices, chunk[g], rows);
    uncut->units[g].units *= pieces;
    partials += (pieces - 1) * rows;
  }
  double time = by_class(uncut->prices, uncut->units, uncut->groups->count, uncut->one_class,
                         uncut->scratch);
  return time + uncut->prices->partial_seconds * (double)partials;
}

static int64_t evenly(int64_t step, int64_t tokens, int64_t pieces) {
  return smaller(ceil_div(tokens, pieces * step) * step, tokens);
}

static int64_t round_up(double value) {
  int64_t whole = (int64_t)value;
  return whole + ((double)whole < value);
}

double fill(Arena *arena, const Prices *prices, const Groups *groups, int64_t *chunk) {
  const int64_t *tokens = groups->tokens;
  int32_t count = groups->count;
  if (!count) return 0;
  Uncut uncut = {
      .prices = prices,
      .groups = groups,
      .units = TAKE(arena, Price, count),
      .one_class = TAKE(arena, Price, count),
      .scratch = TAKE(arena, Price, count),
  };
  Price *units = TAKE(arena, Price, count);
  double *balanced = TAKE(arena, double, prices->classes), total = 0, seconds;
  int64_t *fewest = TAKE(arena, int64_t, count), *tried = TAKE(arena, int64_t, count);
  int64_t longest_wait = 0;
  memset(balanced, 0, (size_t)prices->classes * sizeof(double));
  for (int32_t g = 0; g < count; ++g) {
    units[g] = units_of(prices, tokens[g], group_rows(groups, g));
    double work = units[g].seconds * (double)units[g].units;
    balanced[units[g].tile] += work;
    int waits = (double)(2 * tokens[g]) * prices->token_seconds > work;
    fewest[g] = waits ? ceil_div(tokens[g], prices->longest) : 1;
    if (waits) longest_wait = larger(longest_wait, tokens[g]);
  }
  for (int32_t tile = 0; tile < prices->classes; ++tile)
    total += balanced[tile] /= (double)prices->cores;
  if (longest_wait > prices->longest) {
    for (int32_t g = 0; g < count; ++g)
      chunk[g] = evenly(prices->cut_steps[units[g].tile], tokens[g], fewest[g]);
    seconds = seconds_of(&uncut, chunk);
  } else {
    for (int32_t g = 0; g < count; ++g) fewest[g] = 1;
    memcpy(chunk, tokens, (size_t)count * sizeof(int64_t));
    seconds = by_class(prices, units, groups->count, uncut.one_class, uncut.scratch);
  }
  if (seconds <= SLACK * total) return seconds;
  for (size_t i = 0; i < sizeof SHARES / sizeof *SHARES; ++i) {
    for (int32_t g = 0; g < count; ++g) {
      int64_t pieces = round_up(units[g].seconds / (balanced[units[g].tile] / SHARES[i]));
      int64_t step = prices->cut_steps[units[g].tile];
      tried[g] = evenly(step, tokens[g], larger(pieces, fewest[g]));
    }
    double found = seconds_of(&uncut, tried);
    if (found >= seconds) continue;
    seconds = found;
    memcpy(chunk, tried, (size_t)count * sizeof(int64_t));
  }
  return seconds;
}
