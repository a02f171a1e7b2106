//! `lbridge`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    lbridge::cli::main()
}
