/* How a plan lies in one piece, and the numbers of its layout: see deft_tvm/plan/piece.py. */
#ifndef DEFT_TVM_PIECE_H
#define DEFT_TVM_PIECE_H

enum { HEADER = 8, COLUMNS = 7 };

enum { PAGED, NEEDED, PARTIALS, PAGES, ROWS, POSITIONS, RUNS, DESTS, MERGED, ITEMS };

#endif
