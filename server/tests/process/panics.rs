//! A panic that is not contained ends the process. Each test runs itself again in a child process,
//! which panics.

use std::env;
use std::process::{Command, Output};

use mongodb::Client;
use mongodb::options::ClientOptions;
use rstest::rstest;
use tokio::runtime::Runtime;

const IN_CHILD: &str = "LEASED_TEST_PANIC";

/// Sets up this process as a daemon does, and panics in `place`.
fn panic_in(place: &str) {
    leased::panics::install_hook();
    leased::telemetry::init(None, "info").unwrap();
    match place {
        "thread" => std::thread::spawn(|| panic!("boom")).join().unwrap_err(),
        // The driver panics here, since a client needs a runtime.
        "driver" => std::thread::spawn(|| Client::with_options(ClientOptions::default())).join().unwrap_err(),
        _ => {
            let runtime = Runtime::new().unwrap();
            runtime.block_on(async { tokio::spawn(async { panic!("boom") }).await }).unwrap_err().into_panic()
        }
    };
}

/// Runs the calling test in a child process.
fn in_child(place: &str) -> Output {
    let this = std::thread::current().name().unwrap().to_owned();
    let mut child = Command::new(env::current_exe().unwrap());
    child.args(["--exact", &this, "--nocapture"]).env(IN_CHILD, place);
    child.output().unwrap()
}

#[rstest]
fn a_panic_outside_of_calls_ends_the_process_and_is_reported(#[values("task", "thread")] place: &str) {
    if let Ok(place) = env::var(IN_CHILD) {
        return panic_in(&place);
    }
    let output = in_child(place);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let said = |line: &str| line.starts_with("leased: ended by a panic at ") && line.ends_with(": boom");
    assert!(stderr.lines().any(said), "{stderr}");
}

#[rstest]
#[case::driver_before("driver", false, 1)]
#[case::driver_after("driver", true, 0)]
#[case::ours_after("task", true, 1)]
fn a_panic_in_a_library_is_ignored_once_the_daemon_has_ended(
    #[case] place: &str,
    #[case] has_ended: bool,
    #[case] code: i32,
) {
    if let Ok(place) = env::var(IN_CHILD) {
        if has_ended {
            leased::panics::note_daemon_ended();
        }
        return panic_in(&place);
    }
    let output = in_child(place);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert_eq!(stderr.contains("a panic in a library, at the end of the process"), code == 0, "{stderr}");
}
