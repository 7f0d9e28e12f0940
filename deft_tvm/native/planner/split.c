/* Groups of deft_tvm/plan/split.py, the grouping "sequence", and how groups are cut. */
#include <string.h>

#include "native.h"

Groups take_groups(Arena *arena, int64_t count, int64_t pieces) {
  if (pieces > INT32_MAX) give_up(arena);
  Groups groups = {
      .node = TAKE(arena, int32_t, pieces),
      .begin = TAKE(arena, int64_t, pieces),
      .end = TAKE(arena, int64_t, pieces),
      .indptr = TAKE(arena, int32_t, count + 1),
      .row_begin = TAKE(arena, int32_t, count),
      .row_end = TAKE(arena, int32_t, count),
      .tokens = TAKE(arena, int64_t, count + 1),
  };
  groups.indptr[0] = 0;
  groups.tokens[0] = 0;
  return groups;
}

static void add_piece(Groups *groups, int32_t node, int64_t begin, int64_t end) {
  int32_t piece = groups->pieces++;
  groups->node[piece] = node;
  groups->begin[piece] = begin;
  groups->end[piece] = end;
  groups->tokens[groups->count] += end - begin;
}

void add_node(Groups *groups, const Walk *walk, int32_t node) {
  if (walk->length[node]) add_piece(groups, node, 0, walk->length[node]);
}

void close_group(Groups *groups, int32_t row_begin, int32_t row_end) {
  int32_t group = groups->count;
  if (groups->pieces == groups->indptr[group]) return;
  groups->row_begin[group] = row_begin;
  groups->row_end[group] = row_end;
  groups->count = group + 1;
  groups->indptr[group + 1] = groups->pieces;
  groups->tokens[group + 1] = 0;
}

int32_t *covers_of(Arena *arena, const Walk *walk, const Groups *groups) {
  int32_t *covers = TAKE(arena, int32_t, walk->num_rows + 1);
  memset(covers, 0, ((size_t)walk->num_rows + 1) * sizeof(int32_t));
  for (int32_t g = 0; g < groups->count; ++g) {
    ++covers[groups->row_begin[g]];
    --covers[groups->row_end[g]];
  }
  for (int32_t row = 1; row < walk->num_rows; ++row) covers[row] += covers[row - 1];
  return covers;
}

Groups by_sequence(Arena *arena, const Walk *walk) {
  /* How many nodes of each path have tokens, and the last of them above its end. */
  int32_t *depth = TAKE(arena, int32_t, walk->num_nodes);
  int32_t *above = TAKE(arena, int32_t, walk->num_nodes);
  int32_t holders = 0;
  int64_t pieces = 0;
  for (int32_t i = 0; i < walk->num_nodes; ++i) {
    int32_t parent = walk->parent[i];
    above[i] = parent < 0 || walk->length[parent] ? parent : above[parent];
    depth[i] = (above[i] < 0 ? 0 : depth[above[i]]) + (walk->length[i] > 0);
    if (!walk->own_rows[i]) continue;
    ++holders;
    pieces += depth[i];
  }
  Groups groups = take_groups(arena, holders, pieces);
  int32_t *path = TAKE(arena, int32_t, walk->num_nodes);
  for (int32_t i = 0; i < walk->num_nodes; ++i) {
    if (!walk->own_rows[i]) continue;
    for (int32_t node = walk->length[i] ? i : above[i]; node >= 0; node = above[node])
      path[depth[node] - 1] = node;
    for (int32_t level = 0; level < depth[i]; ++level) add_node(&groups, walk, path[level]);
    close_group(&groups, walk->row_begin[i], walk->row_begin[i] + walk->own_rows[i]);
  }
  return groups;
}

Groups cut_tokens(Arena *arena, const Walk *walk, Groups groups, const int64_t *chunk) {
  int64_t count = 0, pieces = 0;
  for (int32_t g = 0; g < groups.count; ++g) {
    int64_t items = ceil_div(groups.tokens[g], chunk[g]);
    count += items;
    pieces += groups.indptr[g + 1] - groups.indptr[g] + items - 1;
  }
  if (count == groups.count) return groups;
  Groups cut = take_groups(arena, count, pieces);
  for (int32_t g = 0; g < groups.count; ++g) {
    int32_t low = INT32_MAX, high = 0;
    for (int32_t p = groups.indptr[g]; p < groups.indptr[g + 1]; ++p) {
      int32_t node = groups.node[p];
      for (int64_t begin = groups.begin[p], end; begin < groups.end[p]; begin = end) {
        end = smaller(groups.end[p], begin + chunk[g] - cut.tokens[cut.count]);
        int64_t first = walk->row_begin[node] + larger(0, begin - walk->diagonal[node]);
        low = (int32_t)smaller(low, first);
        high = (int32_t)larger(high, walk->row_end[node]);
        add_piece(&cut, node, begin, end);
        int last = end == groups.end[p] && p + 1 == groups.indptr[g + 1];
        if (cut.tokens[cut.count] < chunk[g] && !last) continue;
        close_group(&cut, (int32_t)larger(groups.row_begin[g], low),
                    (int32_t)smaller(groups.row_end[g], high));
        low = INT32_MAX, high = 0;
      }
    }
  }
  return cut;
}

static int64_t visible_end(const Walk *walk, const Groups *groups, int32_t piece, int64_t row_begin,
                           int64_t row_end) {
  int32_t node = groups->node[piece];
  if (row_begin >= walk->row_end[node] || row_end <= walk->row_begin[node]) return 0;
  int64_t seen_by_last = walk->diagonal[node] + row_end - walk->row_begin[node];
  return smaller(groups->end[piece], seen_by_last);
}

static int64_t rows_a_block(int64_t rows, const Prices *prices) {
  int64_t fewest = ceil_div(rows, prices->most_rows), step = prices->row_step;
  return smaller(ceil_div(rows, fewest * step) * step, prices->most_rows);
}

Groups cut_rows(Arena *arena, const Walk *walk, Groups groups, const Prices *prices) {
  int64_t count = 0, pieces = 0;
  int any = 0;
  for (int32_t g = 0; g < groups.count; ++g) {
    int64_t rows = groups.row_end[g] - groups.row_begin[g];
    int64_t blocks = ceil_div(rows, rows_a_block(rows, prices));
    any |= rows > prices->most_rows;
    count += blocks;
    pieces += blocks * (groups.indptr[g + 1] - groups.indptr[g]);
  }
  if (!any) return groups;
  Groups cut = take_groups(arena, count, pieces);
  for (int32_t g = 0; g < groups.count; ++g) {
    int64_t size = rows_a_block(groups.row_end[g] - groups.row_begin[g], prices);
    for (int64_t begin = groups.row_begin[g]; begin < groups.row_end[g]; begin += size) {
      int64_t end = smaller(begin + size, groups.row_end[g]);
      for (int32_t p = groups.indptr[g]; p < groups.indptr[g + 1]; ++p) {
        int64_t seen = visible_end(walk, &groups, p, begin, end);
        if (seen > groups.begin[p]) add_piece(&cut, groups.node[p], groups.begin[p], seen);
      }
      close_group(&cut, (int32_t)begin, (int32_t)end);
    }
  }
  return cut;
}
