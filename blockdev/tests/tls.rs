//! TLS with libnbd (GnuTLS): works with a certificate that fits, and nothing works without TLS where it is required.

mod common;

use std::path::Path;
use std::sync::Arc;

use blockdev::MemoryDevice;
use blockdev::nbd::{Export, ListenAddr, NbdServer, ServerOptions, server_config};
use common::client::*;
use common::{MIB, Server, noise, run, succeed};

const LIBNBD: &str = "libnbd-bin";

fn openssl(folder: &Path, args: &str) {
    let args: Vec<String> = args.split(' ').map(|arg| arg.replace('%', &folder.display().to_string())).collect();
    succeed("openssl", "openssl", &args.iter().map(String::as_str).collect::<Vec<_>>());
}

/// An authority, and certificates of a server called localhost and of a client, under the names that libnbd looks for.
fn certificates(folder: &Path) {
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -days 2";
    let usage = "-addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign";
    openssl(folder, &format!("req -x509 {key} -subj /CN=authority -keyout %/ca-key.pem -out %/ca-cert.pem {usage}"));
    for (name, subject) in [("server", "/CN=localhost"), ("client", "/CN=client")] {
        let extensions = format!("{}/{name}.ext", folder.display());
        std::fs::write(&extensions, "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n").expect("a temporary file");
        openssl(folder, &format!("req {key} -subj {subject} -keyout %/{name}-key.pem -out %/{name}.csr"));
        openssl(
            folder,
            &format!(
                "x509 -req -in %/{name}.csr -CA %/ca-cert.pem -CAkey %/ca-key.pem -CAcreateserial -days 2 \
                 -extfile {extensions} -out %/{name}-cert.pem"
            ),
        );
    }
}

#[test]
fn libnbd_gets_in_with_tls_and_not_without() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    certificates(path);
    let authority = path.join("ca-cert.pem");
    let tls = server_config(&path.join("server-cert.pem"), &path.join("server-key.pem"), Some(&authority)).unwrap();
    let options = ServerOptions { tls: Some(tls), ..ServerOptions::default() };
    let server = Server::with_options(Arc::new(MemoryDevice::new(16 * MIB)), options.clone());

    let any_port = ListenAddr::Tcp("127.0.0.1:0".parse().unwrap());
    let on_tcp = NbdServer::bind(&any_port, options, &server.io).unwrap();
    on_tcp.add_export(Export::new("disk", Arc::new(MemoryDevice::new(16 * MIB)))).unwrap();
    let ListenAddr::Tcp(address) = on_tcp.address() else { panic!("asked for TCP") };
    let uri = |scheme: &str| format!("{scheme}://localhost:{}/disk?tls-certificates={}", address.port(), path.display());

    let info = succeed(LIBNBD, "nbdinfo", &[&uri("nbds")]);
    assert!(info.contains("newstyle-fixed with TLS") && info.contains("export-size: 16777216"), "{info}");
    let plain = run(LIBNBD, "nbdinfo", &[&format!("nbd://127.0.0.1:{}/disk", address.port())]);
    assert!(!plain.status.success(), "without TLS");

    let (source, copy) = (path.join("source"), path.join("copy"));
    std::fs::write(&source, noise(5, 16 * MIB as usize)).unwrap();
    succeed(LIBNBD, "nbdcopy", &[source.to_str().unwrap(), &uri("nbds")]);
    succeed(LIBNBD, "nbdcopy", &[&uri("nbds"), copy.to_str().unwrap()]);
    assert!(std::fs::read(&source).unwrap() == std::fs::read(&copy).unwrap());

    // A client without a certificate of its own.
    let poor = path.join("poor");
    std::fs::create_dir(&poor).unwrap();
    std::fs::copy(&authority, poor.join("ca-cert.pem")).unwrap();
    let stranger = format!("nbds://localhost:{}/disk?tls-certificates={}", address.port(), poor.display());
    assert!(!run(LIBNBD, "nbdinfo", &[&stranger]).status.success());

    // Step by step: refused before TLS; what is sent together with STARTTLS is not taken for something said inside.
    let mut client = Client::greet(&server.socket, 3);
    assert_eq!(client.option(3, &[]), [((1 << 31) + 5, vec![])]);
    assert_eq!(client.option(7, &[&string("disk")[..], &[0, 0]].concat()), [((1 << 31) + 5, vec![])]);
    client.send(&[&b"IHAVEOPT\0\0\0\x05\0\0\0\0"[..], b"IHAVEOPT\0\0\0\x03\0\0\0\0"].concat());
    assert_eq!(client.take(20)[12..16], 1_u32.to_be_bytes(), "STARTTLS is granted");
    let mut rest = Vec::new();
    let _ = std::io::Read::read_to_end(&mut client.stream, &mut rest);
    assert!(!rest.windows(4).any(|window| window == b"disk"), "an option smuggled in before TLS was answered");
}

#[test]
fn files_that_are_no_certificates_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let (empty, missing) = (folder.path().join("empty.pem"), folder.path().join("missing.pem"));
    std::fs::write(&empty, "").unwrap();
    let error = server_config(&empty, &empty, None).unwrap_err().to_string();
    assert!(error.ends_with("empty.pem: no certificate in this file"), "{error}");
    let error = server_config(&missing, &missing, None).unwrap_err().to_string();
    assert!(error.contains("missing.pem"), "{error}");
}
