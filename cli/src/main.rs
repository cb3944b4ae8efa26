//! The `unmask` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    unmask::main()
}
