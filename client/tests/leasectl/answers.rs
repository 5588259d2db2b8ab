//! The commands that print one answer, for people and for scripts.

use std::io::Write;
use std::process::Stdio;

use rstest::rstest;
use serde_json::{Value, json};

use crate::support::{Daemon, Process, end, leasectl};

/// Returns the names of the fields of an object.
fn names(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn a_script_acquires_touches_and_releases() {
    let daemon = Daemon::start();
    let acquired = daemon.json(&["acquire", "a/key", "--ttl=20s"]);
    assert_eq!(names(&acquired), ["key", "lease_id", "token", "ttl_ms"]);
    assert_eq!((&acquired["key"], &acquired["ttl_ms"]), (&json!("a/key"), &json!(20_000)));
    let id = acquired["lease_id"].as_str().unwrap();

    let touched = daemon.json(&["touch", "a/key", id]);
    assert_eq!((names(&touched), &touched["key"]), (vec!["key", "remaining_ms"], &json!("a/key")));
    assert!((10_000..=20_000).contains(&touched["remaining_ms"].as_i64().unwrap()), "{touched}");

    // The id is a secret, so it can also come from the environment or from standard input.
    let touched = end(daemon.leasectl(&["touch", "a/key"]).env("LEASED_ID", id));
    assert_eq!(touched.code, Some(0), "{}", touched.stderr);
    assert!(touched.stdout.starts_with("a/key lasts "), "{}", touched.stdout);
    let mut command = daemon.leasectl(&["--output=json", "release", "a/key", "-"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut release = command.spawn().unwrap();
    writeln!(release.stdin.take().unwrap(), "{id}").unwrap();
    let released = release.wait_with_output().unwrap();
    assert_eq!(released.stdout, b"{\"key\":\"a/key\",\"released\":true}\n");

    let gone = daemon.end(&["touch", "a/key", id]);
    assert_eq!(gone.code, Some(73));
    assert_eq!(gone.stderr, "leasectl: the lease is lost (released); acquire it again\n");
}

#[test]
fn a_key_is_shown_with_its_holders_and_its_queue() {
    let daemon = Daemon::start();
    let labels = ["--metadata=build=12", "--metadata=why=a=b"];
    daemon.json(&[&["acquire", "a/key", "--owner=first", "--min-hold=1s"][..], &labels].concat());
    let mut second = daemon.leasectl(&["acquire", "a/key", "--owner=second", "--shared=2"]);
    let _second = Process::spawn(second.stdout(Stdio::null()));
    daemon.until_key("a/key", |key| !key["waiters"].as_array().unwrap().is_empty());

    let key = daemon.json(&["get", "a/key"]);
    assert_eq!(names(&key), ["blocked_until", "holders", "key", "state", "token", "waiters"]);
    assert_eq!((&key["key"], &key["state"]), (&json!("a/key"), &json!("held")));
    let holder = &key["holders"][0];
    let expected = [
        "acquired_at",
        "expires_at",
        "metadata",
        "mode",
        "owner",
        "remaining_ms",
        "shared_limit",
        "token",
        "ttl_ms",
    ];
    assert_eq!(names(holder), expected);
    assert_eq!(holder["shared_limit"], Value::Null);
    assert_eq!((&holder["owner"], &holder["mode"]), (&json!("first"), &json!("exclusive")));
    assert_eq!(holder["metadata"], json!({ "build": "12", "why": "a=b" }));
    assert_eq!((&holder["ttl_ms"], &holder["token"]), (&json!(30_000), &key["token"]));
    assert!(holder["acquired_at"].as_str().unwrap().ends_with('Z'), "{holder}");
    let waiter = &key["waiters"][0];
    assert_eq!(names(waiter), ["mode", "owner", "shared_limit", "since"]);
    assert_eq!((&waiter["owner"], &waiter["mode"]), (&json!("second"), &json!("shared")));
    assert_eq!(waiter["shared_limit"], 2);

    let text = daemon.end(&["get", "a/key"]).stdout;
    for shown in
        ["a/key  held  token ", "first", "build=12 why=a=b", "30s", "POSITION", "second", "shared, at most 2"]
    {
        assert!(text.contains(shown), "{shown}: {text}");
    }
}

/// On the command line, the value of an option is one label. In the environment variable, each line
/// is one label, without the blanks around it.
#[test]
fn a_label_on_the_command_line_is_used_as_it_is() {
    let daemon = Daemon::start();
    let labels =
        ["--metadata=note=  x  ", "--metadata", " x =y ", "--metadata=empty=", "--metadata=a=b\n\nc=d"];
    daemon.json(&[&["acquire", "a/key"][..], &labels].concat());
    let metadata = json!({ "note": "  x  ", " x ": "y ", "empty": "", "a": "b\n\nc=d" });
    assert_eq!(daemon.json(&["get", "a/key"])["holders"][0]["metadata"], metadata);

    let mut acquire = daemon.leasectl(&["acquire", "b/key"]);
    assert_eq!(end(acquire.env("LEASED_METADATA", "\n\n  a = 1 \n\t\n  b=2\r\n")).code, Some(0));
    assert_eq!(daemon.json(&["get", "b/key"])["holders"][0]["metadata"], json!({ "a ": " 1", "b": "2" }));
    let invalid = end(daemon.leasectl(&["acquire", "c/key"]).env("LEASED_METADATA", "a=1\nnonsense"));
    assert_eq!(invalid.code, Some(2), "{invalid:?}");
    assert!(invalid.stderr.contains("'nonsense'") && invalid.stderr.contains("NAME=VALUE"), "{invalid:?}");
}

#[test]
fn keys_are_listed_by_prefix() {
    let daemon = Daemon::start();
    assert_eq!(daemon.json(&["ls"]), json!([]));
    for key in ["a/1", "a/2", "b/1"] {
        daemon.json(&["acquire", key, "--owner=o\u{1b}[2J"]);
    }
    assert_eq!(daemon.end(&["run", "a/free", "--", "true"]).code, Some(0));
    let keys = |arguments: &[&str]| -> Vec<String> {
        let keys = daemon.json(arguments);
        let keys = keys.as_array().unwrap().iter().map(|key| key["key"].as_str().unwrap().to_owned());
        keys.collect()
    };
    assert_eq!(keys(&["ls"]), ["a/1", "a/2", "b/1"]);
    assert_eq!(keys(&["ls", "a/"]), ["a/1", "a/2"]);
    assert_eq!(keys(&["ls", "a/", "--all"]), ["a/1", "a/2", "a/free"]);

    let text = daemon.end(&["ls", "b/"]).stdout;
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("KEY  STATE  HOLDER"), "{text}");
    assert!(lines.len() == 2 && lines[1].starts_with("b/1  held   o\\u{1b}[2J"), "{text}");
}

#[test]
fn a_watch_shows_every_change() {
    let daemon = Daemon::start();
    let acquired = daemon.json(&["acquire", "a/key"]);
    let watch = |arguments: &[&str]| {
        let mut command = daemon.leasectl(&[arguments, &["watch", "a/"]].concat());
        Process::spawn(command.stdout(Stdio::piped()))
    };
    let (mut text, mut json) = (watch(&[]), watch(&["--output=json"]));
    let mut texts = text.lines();
    let mut objects = json.lines().map(|line| serde_json::from_str::<Value>(&line).unwrap());
    let first = texts.next().unwrap();
    assert!(first.contains("  held        a/key  token "), "{first}");
    let snapshot = objects.next().unwrap();
    assert_eq!((&snapshot["event"], &snapshot["key"]["key"]), (&json!("snapshot"), &json!("a/key")));
    assert_eq!(objects.next().unwrap(), json!({ "event": "snapshot_end" }));

    daemon.json(&["release", "a/key", acquired["lease_id"].as_str().unwrap()]);
    let change = objects.next().unwrap();
    assert_eq!(names(&change), ["event", "key", "kind"]);
    assert_eq!((&change["event"], &change["kind"]), (&json!("change"), &json!("released")));
    assert_eq!(change["key"]["state"], json!("free"));
    let second = texts.next().unwrap();
    assert!(second.contains("  released    a/key  token ") && second.contains("holder -"), "{second}");
    // Both watches end without another change, because nothing reads their output any more.
    drop((texts, objects));
    assert_eq!((text.end().code, json.end().code), (Some(0), Some(0)));
}

#[test]
fn an_operator_revokes_a_lease() {
    let daemon = Daemon::start();
    let acquired = daemon.json(&["acquire", "a/key"]);
    let token = acquired["token"].as_i64().unwrap();
    let other = daemon.end(&["revoke", "a/key", "--reason=test", "--token", &(token + 1).to_string()]);
    assert_eq!((other.code, other.stdout.as_str()), (Some(1), ""));
    assert_eq!(other.stderr, "leasectl: nothing to revoke: no such lease is held; see `leasectl get`\n");
    let revoked = daemon.json(&["revoke", "a/key", "--reason=test", "--token", &token.to_string()]);
    assert_eq!(revoked, json!({ "key": "a/key", "revoked": 1 }));
    let lost = daemon.end(&["touch", "a/key", acquired["lease_id"].as_str().unwrap()]);
    assert_eq!((lost.code, lost.stderr.contains("revoked")), (Some(73), true));
}

#[test]
fn a_revocation_without_a_token_ends_the_block_as_well() {
    let daemon = Daemon::start();
    let revoke = |key: &str| daemon.json(&["revoke", key, "--reason=test"])["revoked"].clone();
    assert_eq!(daemon.end(&["run", "a/key", "--min-hold=1h", "--", "true"]).code, Some(0));
    assert!(daemon.json(&["get", "a/key"])["blocked_until"].is_string());
    assert_eq!(revoke("a/key"), 1);
    assert!(daemon.json(&["get", "a/key"])["blocked_until"].is_null());
    daemon.json(&["acquire", "a/key", "--wait=0"]);

    // One holder still holds, and another has released early and left a block. Both orders of their
    // grants are tried.
    let run = ["run", "b/key", "--shared", "--min-hold=1h", "--", "true"];
    daemon.json(&["acquire", "b/key", "--shared"]);
    assert_eq!(daemon.end(&run).code, Some(0));
    assert_eq!(revoke("b/key"), 2);
    daemon.json(&["acquire", "b/key", "--wait=0"]);

    let early = daemon.json(&["acquire", "c/key", "--shared", "--min-hold=1h"]);
    daemon.json(&["acquire", "c/key", "--shared"]);
    daemon.json(&["release", "c/key", early["lease_id"].as_str().unwrap()]);
    assert_eq!(revoke("c/key"), 2);
    daemon.json(&["acquire", "c/key", "--wait=0"]);
}

#[test]
fn a_closed_output_is_not_a_failure() {
    let daemon = Daemon::start();
    for number in 0..3 {
        daemon.json(&["acquire", &format!("{number:0>500}")]);
    }
    let mut command = daemon.leasectl(&["ls"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    drop(process.stdout.take());
    let ended = process.wait_with_output().unwrap();
    assert_eq!((ended.status.code(), ended.stderr), (Some(0), Vec::new()));
}

/// If nobody has read the lease id, nobody can release the lease. With exit code 0 a script would
/// go on as if it held the lease.
#[test]
fn an_acquire_whose_id_nobody_reads_fails_and_releases_the_lease() {
    let daemon = Daemon::start();
    let mut unread = daemon.leasectl(&["acquire", "a/key", "--ttl=1h"]);
    unread.stdout(std::io::pipe().unwrap().1).stderr(Stdio::piped());
    let ended = Process::spawn(&mut unread).end();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.starts_with("leasectl: nothing reads standard output"), "{ended:?}");
    assert_eq!(daemon.json(&["get", "a/key"])["state"], "free", "released");
}

/// An output to `/dev/null`, however it was opened, means that the caller does not need the id. A
/// closed output looks like `/dev/null`, since Rust's runtime replaces it with that.
#[rstest]
fn a_lease_whose_id_goes_to_dev_null_is_kept(
    #[values("> /dev/null", "1<> /dev/null", ">&-")] redirected: &str,
) {
    let daemon = Daemon::start();
    let command = daemon.leasectl(&["acquire", "a/key", "--ttl=1h", "--wait=0"]);
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", &format!("exec \"$@\" {redirected}"), "sh"]).arg(command.get_program());
    let ended = end(shell.args(command.get_args()).env("LEASED_ENDPOINT", daemon.url()));
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{ended:?}");
    assert_eq!(daemon.json(&["get", "a/key"])["state"], "held");
}

/// Any caller can choose keys and labels, and put control characters into them.
#[test]
fn no_output_contains_characters_that_control_a_terminal() {
    let daemon = Daemon::start();
    let key = "a/\u{202e}yek\u{2028}\u{2066}";
    let owner = "--owner=\u{1b}[2J\u{9b}1m\u{202e}";
    let held = daemon.json(&["acquire", key, owner]);
    assert_eq!(held["key"], key);
    let is_deceptive = |character: char| {
        character.is_control() && character != '\n' || "\u{2028}\u{202e}\u{2066}".contains(character)
    };
    for (arguments, code) in [
        (&["ls"][..], 0),
        (&["get", key], 0),
        (&["acquire", key, "--wait=0"], 75),
        (&["get", "\u{202e}\u{1b}[2J"], 2),
        (&["\u{202e}\u{1b}[2J"], 2),
        (&["run", "b/key", "--", "no-such-\u{202e}\u{1b}[2J"], 127),
        (&["run", "b/key", "--", "/dev/null/\u{202e}\u{1b}[2J"], 126),
    ] {
        for output in ["--output=table", "--output=json"] {
            let ended = daemon.end(&[&[output], arguments].concat());
            assert_eq!(ended.code, Some(code), "{ended:?}");
            assert!(!(ended.stdout + &ended.stderr).contains(is_deceptive), "{arguments:?} {output}");
        }
    }
}

#[test]
fn help_shows_units_defaults_and_environment_variables() {
    let commands = ["run", "acquire", "touch", "release", "get", "ls", "watch", "revoke", "completions"];
    let top = end(&mut leasectl(&["--help"]));
    assert_eq!(top.code, Some(0));
    for command in commands {
        assert!(top.stdout.contains(&format!("\n  {command} ")), "{command}: {}", top.stdout);
        let help = end(&mut leasectl(&[command, "--help"]));
        assert_eq!(help.code, Some(0));
        assert!(help.stdout.contains("LEASED_ENDPOINT"), "{}", help.stdout);
        assert!(!help.stdout.lines().any(|line| line.chars().count() > 120), "{}", help.stdout);
    }
    assert!(!top.stdout.contains("\n  man "), "{}", top.stdout);
    let run = end(&mut leasectl(&["run", "--help"])).stdout;
    for shown in ["LEASED_TTL", "[default: 30s]", "[default: 1h]", "73", "USER@HOST:PID", "NAME=VALUE"] {
        assert!(run.contains(shown), "{shown}: {run}");
    }
    let hidden = end(leasectl(&["touch", "--help"]).env("LEASED_ID", "a-secret"));
    assert!(!hidden.stdout.contains("a-secret"));
}

#[test]
fn completions_and_the_manual_are_printed() {
    for shell in ["bash", "zsh", "fish"] {
        let completions = end(&mut leasectl(&["completions", shell]));
        assert_eq!(completions.code, Some(0));
        assert!(completions.stdout.contains("leasectl") && completions.stdout.contains("revoke"));
    }
    let page = end(&mut leasectl(&["man"])).stdout;
    assert!(page.contains(".TH leasectl ") && page.contains("LEASED_ENDPOINT"), "{page}");
    let page = end(&mut leasectl(&["man", "run"])).stdout;
    assert!(page.contains("leasectl-run") && page.contains("SIGKILL"), "{page}");
    assert_eq!(end(&mut leasectl(&["man", "nonsense"])).code, Some(2));
}
