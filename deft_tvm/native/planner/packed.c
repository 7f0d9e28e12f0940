/* packed and merge_neighbours of deft_tvm/plan/packed.py. */
#include "native.h"

static const double MERGE_GAIN = 0.02;

typedef struct { /* a stretch of groups that became one */
  int32_t start, row_begin, row_end, tree;
  int64_t tokens;
  double cost;
  char mergeable;
} Merged;

static Merged together(const Merged *one, const Merged *other, const Prices *prices,
                       double balanced) {
  Merged both = *one;
  both.row_begin = (int32_t)smaller(one->row_begin, other->row_begin);
  both.row_end = (int32_t)larger(one->row_end, other->row_end);
  both.tokens += other->tokens;
  both.cost = cost(prices, both.tokens, both.row_end - both.row_begin, balanced);
  return both;
}

static int pays(const Merged *one, const Merged *other, const Merged *both, const Prices *prices) {
  double apart = one->cost + other->cost;
  int32_t twice = one->row_end - one->row_begin + (other->row_end - other->row_begin);
  twice -= both->row_end - both->row_begin;
  double gain = apart + twice * prices->partial_seconds - both->cost;
  return gain > MERGE_GAIN * apart;
}

/* One round of disjoint pairs, in place; how many there are after it. */
static int32_t merge_pairs(Merged *list, int32_t count, const Prices *prices, double balanced) {
  int32_t kept = 0;
  for (int32_t i = 0, taken; i < count; i += taken) {
    const Merged *one = &list[i], *other = one + 1;
    Merged best = *one;
    taken = 1;
    if (i + 1 < count && one->mergeable && other->mergeable && one->tree == other->tree) {
      Merged both = together(one, other, prices, balanced);
      if (pays(one, other, &both, prices)) best = both, taken = 2;
    }
    list[kept++] = best;
  }
  return kept;
}

static Groups merge_neighbours(Arena *arena, Groups groups, const char *mergeable,
                               const Clusters *clusters, const Prices *prices) {
  const Walk *walk = clusters->walk;
  int32_t *tree = TAKE(arena, int32_t, walk->num_nodes), trees = 0;
  for (int32_t i = 0; i < walk->num_nodes; ++i) tree[i] = trees += walk->parent[i] < 0;
  Merged *list = TAKE(arena, Merged, groups.count);
  for (int32_t g = 0; g < groups.count; ++g) {
    int32_t rows = groups.row_end[g] - groups.row_begin[g];
    list[g] = (Merged){
        .start = g,
        .row_begin = groups.row_begin[g],
        .row_end = groups.row_end[g],
        .tree = tree[groups.node[groups.indptr[g]]],
        .tokens = groups.tokens[g],
        .cost = cost(prices, groups.tokens[g], rows, clusters->balanced),
        .mergeable = mergeable[g],
    };
  }
  int32_t count = groups.count, before;
  do {
    before = count;
    count = merge_pairs(list, count, prices, clusters->balanced);
  } while (count < before && count > 1);
  for (int32_t g = 0; g < count; ++g) {
    groups.indptr[g] = groups.indptr[list[g].start];
    groups.row_begin[g] = list[g].row_begin;
    groups.row_end[g] = list[g].row_end;
    groups.tokens[g] = list[g].tokens;
  }
  groups.indptr[count] = groups.pieces;
  groups.count = count;
  return groups;
}

Groups packed(Arena *arena, const Walk *walk, const Prices *prices) {
  char *mergeable;
  Clusters clusters = contract(arena, walk, prices);
  char *joins = hand_down(arena, &clusters, prices);
  Groups groups = by_cluster(arena, &clusters, joins, &mergeable);
  if (groups.count < 2) return groups;
  return merge_neighbours(arena, groups, mergeable, &clusters, prices);
}
