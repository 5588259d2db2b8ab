//! A panic that belongs to no call ends the process, in a child that is this test once more.

use std::env;
use std::process::Command;

use rstest::rstest;

const IN_CHILD: &str = "LEASED_TEST_PANIC";

/// What a daemon does with a panic in this place.
fn panic_in(place: &str) {
    leased::panics::end_the_process();
    leased::telemetry::init(None, "info").unwrap();
    match place {
        "thread" => std::thread::spawn(|| panic!("boom")).join().unwrap_err(),
        _ => {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async { tokio::spawn(async { panic!("boom") }).await }).unwrap_err().into_panic()
        }
    };
}

#[rstest]
fn a_panic_outside_of_calls_ends_the_process_and_says_so(#[values("task", "thread")] place: &str) {
    if let Ok(place) = env::var(IN_CHILD) {
        return panic_in(&place);
    }
    let this = std::thread::current().name().unwrap().to_owned();
    let mut child = Command::new(env::current_exe().unwrap());
    child.args(["--exact", &this, "--nocapture"]).env(IN_CHILD, place);
    let output = child.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let said = |line: &str| line.starts_with("leased: ended by a panic at ") && line.ends_with(": boom");
    assert!(stderr.lines().any(said), "{stderr}");
}
