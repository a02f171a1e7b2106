//! The kernel suite on the kernel that runs.

mod kernel;

fn main() {
    kernel::suite().main()
}
