// Memory for the intermediate values of a call.
//
// One piece is kept for the next call of the process: giving pages back to the system and taking them anew at every
// call costs up to a tenth of the time of a product of many tokens.
#pragma once

#include <stdlib.h>

#include <atomic>

namespace {

constexpr size_t kLargestKept = 32 << 20;  // bytes
constexpr size_t kHead = 64;               // before a piece, for its size; keeps what follows aligned

std::atomic<char*> kept_piece{nullptr};

size_t& size_of(char* piece) { return *reinterpret_cast<size_t*>(piece - kHead); }

void release(char* piece) { free(piece - kHead); }

// At least so many bytes, aligned to a cache line; null where there is no memory.
char* take_scratch(size_t bytes) {
  if (char* const kept = kept_piece.exchange(nullptr)) {
    if (size_of(kept) >= bytes) return kept;
    release(kept);
  }
  void* start = nullptr;
  if (posix_memalign(&start, kHead, kHead + bytes)) return nullptr;
  char* const piece = static_cast<char*>(start) + kHead;
  size_of(piece) = bytes;
  return piece;
}

// Threads may call at the same time: who comes second frees its piece.
void give_back_scratch(char* piece) {
  char* none = nullptr;
  if (size_of(piece) > kLargestKept || !kept_piece.compare_exchange_strong(none, piece)) release(piece);
}

}  // namespace
