/* Walk of deft_tvm/plan/split.py. */
#include "native.h"

Walk walk_of(Arena *arena, const Forest *forest) {
  int32_t count = (int32_t)forest->num_nodes;
  Walk walk = {
      .num_nodes = count,
      .num_rows = (int32_t)forest->num_rows,
      .node = (int32_t *)forest->preorder,
      .parent = TAKE(arena, int32_t, count),
      .subtree_end = TAKE(arena, int32_t, count),
      .row_begin = TAKE(arena, int32_t, count),
      .row_end = TAKE(arena, int32_t, count),
      .own_rows = TAKE(arena, int32_t, count),
      .length = TAKE(arena, int64_t, count),
      .diagonal = TAKE(arena, int64_t, count),
      .start = TAKE(arena, int64_t, count),
  };
  for (int32_t place = 0; place < count; ++place) {
    int32_t node = forest->preorder[place], above = forest->parents[node];
    walk.parent[place] = above < 0 ? -1 : forest->position[above];
    walk.subtree_end[place] = forest->subtree_end[node];
    walk.row_begin[place] = forest->row_begin[node];
    walk.row_end[place] = forest->row_end[node];
    walk.own_rows[place] = forest->rows[node];
    walk.length[place] = walk.row_end[place] > walk.row_begin[place] ? forest->lengths[node] : 0;
    walk.diagonal[place] = forest->diagonal[node];
    walk.start[place] = forest->start[node];
  }
  return walk;
}
