// Barriers of a block.
#pragma once

namespace mmk::emulator {

void begin_barriers();
void end_barriers();  // nobody may be left who arrived

}  // namespace mmk::emulator
