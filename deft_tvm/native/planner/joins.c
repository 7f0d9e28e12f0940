/* hand_down and by_cluster of deft_tvm/plan/joins.py. */
#include <string.h>

#include "native.h"

static int32_t rows_of(const Clusters *clusters, int32_t c) {
  return clusters->row_end[c] - clusters->row_begin[c];
}

char *hand_down(Arena *arena, const Clusters *clusters, const Prices *prices) {
  char *joins = TAKE(arena, char, clusters->count);
  double *saved = TAKE(arena, double, clusters->count);
  memset(joins, 0, (size_t)clusters->count);
  int any = 0;
  for (int32_t c = 0; c < clusters->count; ++c) {
    int32_t parent = clusters->parent[c], rows = rows_of(clusters, c);
    if (parent < 0 || !rows) continue;
    int64_t above = clusters->tokens[parent];
    double share = clusters->cost[parent] * rows / rows_of(clusters, parent);
    int last = clusters->parent[parent] < 0 && clusters->own_rows[c] == rows;
    double partials = prices->partial_seconds * rows * (last ? 2 : 1) * (above > 0);
    saved[c] = share + partials + clusters->cost[c];
    int64_t tokens = clusters->tokens[c] + above;
    joins[c] = cost(prices, tokens, rows, clusters->balanced) <= saved[c];
    any |= joins[c];
  }
  if (!any) return NULL;
  /* Tokens that a cluster would read from above by way of the joins so far. */
  int64_t *handed = TAKE(arena, int64_t, clusters->count);
  for (int32_t c = 0; c < clusters->count; ++c)
    handed[c] = joins[c] ? clusters->tokens[clusters->parent[c]] + handed[clusters->parent[c]] : 0;
  for (int32_t c = 0; c < clusters->count; ++c) {
    if (!joins[c]) continue;
    int64_t above = handed[c], tokens = clusters->tokens[c] + above;
    double price = cost(prices, tokens, rows_of(clusters, c), clusters->balanced);
    joins[c] = above > 0 && price <= saved[c];
  }
  return memchr(joins, 1, (size_t)clusters->count) ? joins : NULL;
}

static Groups one_each(Arena *arena, const Clusters *clusters, char **mergeable) {
  Groups groups = take_groups(arena, clusters->count, clusters->walk->num_nodes);
  for (int32_t c = 0; c < clusters->count; ++c) {
    for (int32_t node = clusters->begin[c]; node < clusters->end[c]; ++node)
      add_node(&groups, clusters->walk, node);
    close_group(&groups, clusters->row_begin[c], clusters->row_end[c]);
  }
  *mergeable = TAKE(arena, char, groups.count);
  memset(*mergeable, 1, (size_t)groups.count);
  return groups;
}

typedef struct { /* the rows that stay with a cluster: [begin, end), several a cluster */
  int32_t *indptr, *begin, *end;
} Remaining;

static Remaining remaining_rows(Arena *arena, const Clusters *clusters, const char *joins) {
  int32_t count = clusters->count;
  Remaining rows = {
      .indptr = TAKE(arena, int32_t, count + 1),
      .begin = TAKE(arena, int32_t, 2 * count),
      .end = TAKE(arena, int32_t, 2 * count),
  };
  int32_t *next = TAKE(arena, int32_t, count), total = 0;
  memset(rows.indptr, 0, ((size_t)count + 1) * sizeof(int32_t));
  for (int32_t c = 0; c < count; ++c) {
    rows.indptr[c] += clusters->own_rows[c] > 0;
    int stays = !joins[c] && clusters->parent[c] >= 0 && rows_of(clusters, c) > 0;
    if (stays) ++rows.indptr[clusters->parent[c]];
  }
  for (int32_t c = 0; c <= count; ++c) {
    int32_t entries = rows.indptr[c];
    rows.indptr[c] = total;
    if (c < count) next[c] = total;
    total += entries;
  }
  for (int32_t c = 0; c < count; ++c) {
    if (clusters->own_rows[c]) {
      rows.begin[next[c]] = clusters->row_begin[c];
      rows.end[next[c]++] = clusters->row_begin[c] + clusters->own_rows[c];
    }
    if (joins[c] || clusters->parent[c] < 0 || !rows_of(clusters, c)) continue;
    int32_t to = next[clusters->parent[c]]++;
    rows.begin[to] = clusters->row_begin[c];
    rows.end[to] = clusters->row_end[c];
  }
  return rows;
}

Groups by_cluster(Arena *arena, const Clusters *clusters, const char *joins, char **mergeable) {
  if (!joins) return one_each(arena, clusters, mergeable);
  int32_t count = clusters->count;
  Remaining rows = remaining_rows(arena, clusters, joins);
  /* How many clusters, and nodes, each reads together with those that it has joined. */
  int32_t *read = TAKE(arena, int32_t, count);
  int64_t *nodes = TAKE(arena, int64_t, count), pieces = 0;
  for (int32_t c = 0; c < count; ++c) {
    int32_t parent = clusters->parent[c];
    read[c] = 1 + (joins[c] ? read[parent] : 0);
    nodes[c] = clusters->end[c] - clusters->begin[c] + (joins[c] ? nodes[parent] : 0);
    pieces += nodes[c] * (rows.indptr[c + 1] - rows.indptr[c]);
  }
  Groups groups = take_groups(arena, rows.indptr[count], pieces);
  *mergeable = TAKE(arena, char, rows.indptr[count]);
  int32_t *chain = TAKE(arena, int32_t, count);
  for (int32_t c = 0; c < count; ++c) {
    for (int32_t at = c, i = read[c]; i-- > 0; at = clusters->parent[at]) chain[i] = at;
    for (int32_t i = rows.indptr[c], next; i < rows.indptr[c + 1]; i = next) {
      next = i + 1;
      while (next < rows.indptr[c + 1] && rows.begin[next] == rows.end[next - 1]) ++next;
      int32_t begin = rows.begin[i], end = rows.end[next - 1];
      for (int32_t link = 0; link < read[c]; ++link)
        for (int32_t node = clusters->begin[chain[link]]; node < clusters->end[chain[link]]; ++node)
          add_node(&groups, clusters->walk, node);
      (*mergeable)[groups.count] = end - begin == rows_of(clusters, c) && read[c] == 1;
      close_group(&groups, begin, end);
    }
  }
  return groups;
}
