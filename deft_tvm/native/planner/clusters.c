/* contract of deft_tvm/plan/clusters.py. */
#include <math.h>
#include <string.h>

#include "native.h"

static int64_t floor_div(int64_t a, int64_t b) { return a < 0 ? -((b - 1 - a) / b) : a / b; }

/* Sums over each node's subtree, in place: whatever has a parent is added to it, the last first. */
static void sum_subtrees(const Walk *walk, int64_t *values) {
  for (int32_t i = walk->num_nodes; i-- > 0;)
    if (walk->parent[i] >= 0) values[walk->parent[i]] += values[i];
}

static int64_t *tokens_a_block(Arena *arena, const Walk *walk, int64_t *tokens, int64_t most) {
  int any = 0;
  for (int32_t i = 0; i < walk->num_nodes; ++i)
    any |= walk->row_end[i] - walk->row_begin[i] > most;
  if (!any) return tokens;
  int64_t *reads = TAKE(arena, int64_t, walk->num_nodes);
  for (int32_t i = 0; i < walk->num_nodes; ++i)
    reads[i] = walk->length[i] *
               (floor_div(walk->row_end[i] - 1, most) - walk->row_begin[i] / most + 1);
  sum_subtrees(walk, reads);
  for (int32_t i = 0; i < walk->num_nodes; ++i) {
    int64_t blocks = larger(1, ceil_div(walk->row_end[i] - walk->row_begin[i], most));
    reads[i] = smaller(tokens[i], reads[i] / blocks);
  }
  return reads;
}

Clusters contract(Arena *arena, const Walk *walk, const Prices *prices) {
  int32_t count = walk->num_nodes;
  int64_t *tokens = TAKE(arena, int64_t, count), *worse = TAKE(arena, int64_t, count);
  double *alone = TAKE(arena, double, count), *whole = TAKE(arena, double, count);
  double *below = TAKE(arena, double, count), balanced = 0;
  memcpy(tokens, walk->length, (size_t)count * sizeof(int64_t));
  sum_subtrees(walk, tokens);
  int64_t *reads = tokens_a_block(arena, walk, tokens, prices->most_rows);
  for (int32_t i = 0; i < count; ++i)
    balanced += cost(prices, walk->length[i], walk->row_end[i] - walk->row_begin[i], INFINITY);
  memset(below, 0, (size_t)count * sizeof(double));
  for (int32_t i = 0; i < count; ++i) {
    int32_t rows = walk->row_end[i] - walk->row_begin[i];
    alone[i] = cost(prices, walk->length[i], rows, balanced);
    whole[i] = reads[i] == walk->length[i] ? alone[i] : cost(prices, reads[i], rows, balanced);
    if (walk->parent[i] >= 0) below[walk->parent[i]] += whole[i];
  }
  for (int32_t i = 0; i < count; ++i) {
    int64_t partials = walk->row_end[i] - walk->row_begin[i] - walk->own_rows[i];
    partials *= (walk->length[i] > 0) * (walk->parent[i] >= 0 ? 1 : 2);
    worse[i] = whole[i] > alone[i] + (double)partials * prices->partial_seconds + below[i];
  }
  sum_subtrees(walk, worse);
  Clusters found = {.walk = walk, .balanced = balanced};
  int32_t *cluster = TAKE(arena, int32_t, count); /* the last that begins up to here */
  for (int32_t i = 0; i < count; ++i) {
    int32_t above = walk->parent[i];
    found.count += !(!worse[i] && above >= 0 && !worse[above]);
    cluster[i] = found.count - 1;
  }
  int32_t **ints[] = {&found.begin,     &found.end,     &found.parent,
                      &found.row_begin, &found.row_end, &found.own_rows};
  for (size_t i = 0; i < sizeof ints / sizeof *ints; ++i)
    *ints[i] = TAKE(arena, int32_t, found.count);
  found.tokens = TAKE(arena, int64_t, found.count);
  found.cost = TAKE(arena, double, found.count);
  for (int32_t i = 0; i < count; ++i) {
    int32_t c = cluster[i];
    if (c == (i ? cluster[i - 1] : -1)) continue;
    int taken = !worse[i];
    found.begin[c] = i;
    found.end[c] = taken ? walk->subtree_end[i] : i + 1;
    found.parent[c] = walk->parent[i] < 0 ? -1 : cluster[walk->parent[i]];
    found.row_begin[c] = walk->row_begin[i];
    found.row_end[c] = walk->row_end[i];
    found.own_rows[c] = taken ? walk->row_end[i] - walk->row_begin[i] : walk->own_rows[i];
    found.tokens[c] = taken ? tokens[i] : walk->length[i];
    found.cost[c] = taken ? whole[i] : alone[i];
  }
  return found;
}
