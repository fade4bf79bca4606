// Barriers of a block.
#pragma once

namespace mmk::emulator {

void begin_barriers();
void end_barriers();              // nobody may be left who arrived
void complete_cluster_barrier();  // if all threads of the cluster are there that have not ended

}  // namespace mmk::emulator
