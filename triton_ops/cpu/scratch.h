// Memory for the intermediate values of a call.
//
// One piece is kept for the next call of the process: giving pages back to the system and taking them anew at every
// call costs up to a tenth of the time of a product of many tokens.
#pragma once

#include <stdlib.h>

#include <atomic>
#include <cstring>

namespace {

constexpr size_t kLargestKept = 32 << 20;  // bytes
constexpr size_t kHead = 64;               // before a piece, for its size; keeps what follows aligned

std::atomic<char*> kept_piece{nullptr};

size_t& size_of(char* piece) { return *reinterpret_cast<size_t*>(piece - kHead); }

void release(char* piece) { free(piece - kHead); }

char* new_piece(size_t bytes) {
  void* start = nullptr;
  if (posix_memalign(&start, kHead, kHead + bytes)) return nullptr;
  char* const piece = static_cast<char*>(start) + kHead;
  size_of(piece) = bytes;
  return piece;
}

// At least so many bytes, aligned to a cache line; null where there is no memory.
char* take_scratch(size_t bytes) {
  char* piece = kept_piece.exchange(nullptr);
  if (piece && size_of(piece) < bytes) release(piece), piece = nullptr;
  if (!piece) piece = new_piece(bytes);
#if defined(HFS_POISON)  // for tests: NaN in all that a call should write before it reads
  if (piece) std::memset(piece, 0xff, size_of(piece));
#endif
  return piece;
}

// Threads may call at the same time: who comes second frees its piece.
void give_back_scratch(char* piece) {
  char* none = nullptr;
  if (size_of(piece) > kLargestKept || !kept_piece.compare_exchange_strong(none, piece)) release(piece);
}

}  // namespace
