/* Prices and makespan of deft_tvm/plan/cost.py. */
#include "native.h"

/* Of all units of an item in one class, one after another. */
static double item_seconds(const Prices *prices, int32_t tile, int64_t tokens, int64_t rows) {
  double reading = (double)tokens * prices->token_seconds;
  int64_t at = tile * (prices->most_rows + 1) + rows;
  double seconds = (double)ceil_div(tokens, prices->kv_tile[tile]) * prices->step_seconds[at];
  return (seconds > reading ? seconds : reading) + prices->fixed_seconds[at];
}

Price price_in(const Prices *prices, int32_t tile, int64_t tokens, int64_t rows) {
  int64_t units = prices->units[tile];
  return (Price){tile, units, item_seconds(prices, tile, tokens, rows) / (double)units};
}

Price choose_tile(const Prices *prices, int64_t tokens, int64_t rows) {
  int32_t best = 0;
  double least = 0;
  for (int32_t tile = 0; tile < prices->classes; ++tile) {
    double seconds = item_seconds(prices, tile, tokens, rows);
    if (tile && seconds >= least) continue;
    best = tile;
    least = seconds;
  }
  return (Price){best, prices->units[best], least / (double)prices->units[best]};
}

Price units_of(const Prices *prices, int64_t tokens, int64_t rows) {
  int64_t blocks = ceil_div(rows, prices->most_rows);
  Price price = choose_tile(prices, tokens, ceil_div(rows, larger(blocks, 1)));
  price.units *= blocks;
  return price;
}

double cost(const Prices *prices, int64_t tokens, int64_t rows, double balanced) {
  if (tokens <= 0) return 0;
  Price price = units_of(prices, tokens, rows);
  double busy = price.seconds * (double)price.units / (double)prices->cores;
  if (balanced >= price.seconds) return busy;
  return busy + (price.seconds / balanced - 1) * (double)rows * prices->partial_seconds;
}

/* Merges neighbouring runs of twice the length each time; those of few are sorted by insertion. */
static void sort_longest_first(Price *units, Price *scratch, int32_t count) {
  enum { FEW = 16 };
  for (int32_t begin = 0; begin < count; begin += FEW) {
    int32_t end = begin + FEW < count ? begin + FEW : count;
    for (int32_t i = begin + 1; i < end; ++i) {
      Price moved = units[i];
      int32_t j = i;
      for (; j > begin && units[j - 1].seconds < moved.seconds; --j) units[j] = units[j - 1];
      units[j] = moved;
    }
  }
  for (int32_t width = FEW; width < count; width *= 2) {
    for (int32_t begin = 0; begin + width < count; begin += 2 * width) {
      int32_t middle = begin + width, end = middle + width < count ? middle + width : count;
      if (units[middle - 1].seconds >= units[middle].seconds) continue;
      for (int32_t i = begin; i < middle; ++i) scratch[i - begin] = units[i];
      int32_t left = 0, right = middle, to = begin;
      while (left < width && right < end) {
        int longer = scratch[left].seconds >= units[right].seconds;
        units[to++] = longer ? scratch[left++] : units[right++];
      }
      while (left < width) units[to++] = scratch[left++];
    }
  }
}

double makespan(Price *units, Price *scratch, int32_t count, int64_t cores) {
  double total = 0, longest = 0;
  for (int32_t i = 0; i < count; ++i) total += units[i].seconds * (double)units[i].units;
  sort_longest_first(units, scratch, count);
  int64_t taken = 0;
  for (int32_t i = 0; i < count; ++i) {
    taken += units[i].units;
    double wave = (double)ceil_div(taken, cores) * units[i].seconds;
    if (wave > longest) longest = wave;
  }
  double mean = total / (double)cores;
  return mean > longest ? mean : longest;
}

double by_class(const Prices *prices, const Price *units, int32_t count, Price *one_class,
                Price *scratch) {
  double total = 0;
  for (int32_t tile = 0; tile < prices->classes; ++tile) {
    int32_t of_class = 0;
    for (int32_t i = 0; i < count; ++i)
      if (units[i].tile == tile) one_class[of_class++] = units[i];
    if (of_class) total += makespan(one_class, scratch, of_class, prices->cores);
  }
  return total;
}
