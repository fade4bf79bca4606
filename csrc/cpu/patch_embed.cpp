namespace mmk::MMK_ISA {}
