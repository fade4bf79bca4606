// Barriers of a block.
#pragma once

namespace mmk::emulator {

void begin_barriers();
void end_barriers();
void complete_cluster_barrier();  // if all threads of the cluster that have not ended are there  // nobody may be left
                                  // who arrived

}  // namespace mmk::emulator
