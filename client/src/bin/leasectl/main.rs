//! leasectl: leases for people and scripts. Dispatches the commands, and returns the exit code.

/// The command line: commands, options and their environment variables.
mod args;
/// Failures: a sentence and an exit code for each.
mod failure;

// Commands.

/// The commands that print one answer and end.
mod calls;
/// `watch`: prints a line for each change.
mod watch;
/// `run`: runs a command for as long as a lease is held.
mod run;
/// Prints the manual and completions.
mod manual;

// What the commands share.

/// Acquires a lease, and shows the wait on a terminal.
mod wait;
/// The default owner label.
mod owner;
/// Writes answers to standard output, for people or as JSON.
mod output;
/// Keys and changes for people.
mod table;
/// Keys and changes as JSON.
mod json;
/// Checks that enough files can be opened.
mod files;

// What `run` is made of.

/// When the command must end.
mod times;
/// The command and its process group.
mod job;
/// The process that kills a command which would outlive its lease.
mod guardian;
/// Signals: receives them, and ends leasectl by one.
mod signals;
/// The controlling terminal, and which process group has it.
mod terminal;
/// Groups, sessions and parents of processes.
mod processes;
/// Waits for processes that the first process of a container adopts.
mod orphans;

use std::process::ExitCode;

use leased_client::Client;
use tokio::runtime::Builder;

use args::{Args, Command};
use failure::Failure;
use output::Output;

fn main() -> ExitCode {
    // `run` starts this program again as the guardian, which takes no options and must start
    // quickly.
    if std::env::args_os().next().is_some_and(|role| role == guardian::ROLE) {
        return guardian::main();
    }
    let args = match Args::read() {
        Ok(args) => args,
        Err(error) => return failure::usage(&error),
    };
    let format = args.output;
    if let Err(failure) = files::make_sure_of_room() {
        return failure.report(format);
    }
    // One thread, which lasts as long as leasectl. A child may have asked for a signal when the
    // thread that started it ends (`PR_SET_PDEATHSIG` in prctl(2)). A short command also starts
    // sooner.
    let runtime = match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::from(error).report(format),
    };
    match runtime.block_on(execute(args)) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => failure.report(format),
    }
}

async fn execute(args: Args) -> Result<u8, Failure> {
    let Args { connection, output, command } = args;
    let mut output = Output::new(output);
    if let Command::Completions { shell } = command {
        return manual::completions(shell, &mut output);
    }
    if let Command::Man { command } = command {
        return manual::page(command.as_deref(), &mut output);
    }
    let client = connection.client()?;
    let done = perform(&client, command, &mut output).await;
    match done {
        Err(Failure::Client(error)) => Err(failure::explain(error, connection.endpoints()).await),
        done => done,
    }
}

async fn perform(client: &Client, command: Command, output: &mut Output) -> Result<u8, Failure> {
    match command {
        Command::Run { args, command } => run::run(client, args, &command).await,
        Command::Acquire { args } => calls::acquire(client, args, output).await,
        Command::Touch(lease) => calls::touch(client, lease, output).await,
        Command::Release(lease) => calls::release(client, lease, output).await,
        Command::Get { key } => calls::get(client, &key, output).await,
        Command::Ls { prefix, all } => calls::list(client, prefix, all, output).await,
        Command::Watch { prefix } => watch::watch(client, prefix, output).await,
        Command::Revoke { key, token, reason } => calls::revoke(client, &key, token, &reason, output).await,
        // `execute` handles these two, because they need no client.
        Command::Completions { .. } | Command::Man { .. } => Ok(0),
    }
}
