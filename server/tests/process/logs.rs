//! Callers' text in the log cannot break out of its log line.

use std::io::Read;

use leased_proto::v1::RevokeRequest;
use leased_proto::v1::admin_service_client::AdminServiceClient;
use rstest::rstest;

use crate::support::{Running, daemon};

#[rstest]
#[tokio::test]
async fn a_revocation_makes_one_log_line_whatever_its_reason_contains(
    #[values("text", "json")] format: &str,
) {
    let folder = tempfile::tempdir().unwrap();
    let mut command = daemon(&["--log-format", format]);
    command.current_dir(folder.path());
    let mut running = Running::spawn(command).ready();
    let address = format!("http://{}", running.field("grpc="));
    let mut admin = AdminServiceClient::connect(address).await.unwrap();
    let reason = "maintenance\n2026-01-01T00:00:00Z  INFO leased: forged\r\u{1b}[2K\u{9b}1m\u{2028}\u{202e}\" revoked=9";
    let request =
        RevokeRequest { key: "a key revoked=8".to_owned(), fencing_token: 7, reason: reason.to_owned() };
    assert_eq!(admin.revoke(request).await.unwrap().into_inner().revoked, 0);
    running.signal("TERM");
    assert_eq!(running.code(), Some(0));

    let mut log = String::new();
    running.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("forged")).collect();
    assert_eq!(lines.len(), 1, "{log}");
    assert!(lines[0].contains("maintenance") && lines[0].contains("revoked=9"), "{log}");
    // Characters that end a line for some reader, or change the order of the text, must be escaped.
    let is_deceptive = |char: char| char.is_control() || ['\u{2028}', '\u{202e}'].contains(&char);
    assert!(log.chars().all(|char| char == '\n' || !is_deceptive(char)), "{log:?}");
    let shown = match format {
        "text" => [r#"key="a key revoked=8" fencing_token=7"#, r"forged\r\u{1b}[2K\u{9b}1m\u{2028}\u{202e}"],
        _ => [r#""key":"a key revoked=8","fencing_token":7"#, r"forged\r\u001b[2K\u009b1m\u2028\u202e"],
    };
    for shown in shown {
        assert!(lines[0].contains(shown), "no {shown}: {log}");
    }
}
