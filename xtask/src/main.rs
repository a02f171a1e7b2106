//! xtask: the project's own tools, run with `cargo xtask`.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

mod apt;
mod bench;
mod bench_peer;
mod bpf_toolchain;
mod build_ebpf;
mod ci;
mod kernels;
mod lint;
mod package;
mod roots;
mod run;
mod setup;
mod test;
mod tool;
mod workspace;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "The tools of the lbridge project")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure the paths against a service bound on the gateway (root), as Markdown tables
    Bench(bench::Arguments),
    /// The service that the benchmark reaches
    #[command(hide = true)]
    BenchPeer(bench_peer::Arguments),
    /// Build the object with the kernel programs, and the file that says what made it
    BuildEbpf(build_ebpf::Arguments),
    /// Run everything that must hold before a change goes in
    Ci(ci::Arguments),
    /// Check the form of the sources, the documents and the commits
    Lint,
    /// Make what people install: packages, and an archive with a static binary (target/package)
    Package(package::Arguments),
    /// Do the main job: with the Docker Engine of this machine, or else in a private lab
    Run(run::Arguments),
    /// Install what the tests and the check of the object need (Debian, root)
    Setup,
    /// Run every test and end with one summary
    Test(test::Arguments),
}

fn main() -> ExitCode {
    // These do not return in a process that was started to be something else.
    bpf_toolchain::wrapper_hook();
    lbridge_tests::harness::sandbox::hook();
    match dispatch(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> Result<ExitCode> {
    match command {
        Command::Bench(arguments) => bench::handle(&arguments)?,
        Command::BenchPeer(arguments) => bench_peer::handle(&arguments)?,
        Command::BuildEbpf(arguments) => build_ebpf::handle(&arguments)?,
        Command::Ci(arguments) => ci::handle(&arguments)?,
        Command::Lint => lint::handle()?,
        Command::Package(arguments) => package::handle(&arguments)?,
        Command::Run(arguments) => run::handle(&arguments)?,
        Command::Setup => setup::handle()?,
        Command::Test(arguments) => {
            if !test::handle(&arguments)? {
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
