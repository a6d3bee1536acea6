"""URLs that try to lead a server into its own network, by trick. {port} is that of a canary."""

from __future__ import annotations

# fmt: off
MALFORMED_ADDRESSES = [
    f"http://{host}:{{port}}/"
    for host in (
        # one number: decimal, octal, hexadecimal
        "2130706433", "017700000001", "0x7f000001", "0X7F000001", "0x7F.1", "4294967295", "0", "00", "0x0", "0x",
        "3232235777", "2852039166", "0xa9fea9fe", "025177524776", "99999999999999999999",
        # parts left out
        "127.1", "127.0.1", "10.1", "192.168.257", "169.254.43518", "0.0", "1.0.1",
        # octal and hexadecimal parts, leading zeros
        "0177.0.0.1", "0177.0.0.01", "0x7f.0.0.1", "0x7f.0x0.0x0.0x1", "127.0.0.0x1", "0177.0x0.0.1", "0127.0.0.1",
        "127.000.000.001", "127.0.0.01", "010.0.0.1", "00012.0.0.1", "0xa9.0xfe.0xa9.0xfe", "0251.0376.0251.0376",
        "169.254.0251.254", "0xac.16.0.1", "192.0250.1.1",
        # out of range, too many, empty parts, trailing dots
        "256.0.0.1", "383.0.0.1", "127.0.0.257", "127.0.0.1.1", "127.0.0.1.", "127.0.0.1..", "127..0.1", ".127.0.0.1",
        "127.0.0.1.0x", "evil.example.1", "evil.example.0x7f", "localhost.", "evil.example.", "evil..example",
        # percent-encoded, wide or odd digits and dots
        "127%2e0%2e0%2e1", "%31%32%37.0.0.1", "127.0.0.1%00.example.org", "localhost%00",
        "%6c%6f%63%61%6c%68%6f%73%74",
        "127.0.0.1%20", "127.0.0.1%23.example.org", "127\u30020\u30020\u30021", "127\uff0e0\uff0e0\uff0e1",
        "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460",
        "\uff11\uff12\uff17.0.0.1", "\u0661\u0662\u0667.\u0660.\u0660.\u0661",
        "\u24db\u24de\u24d2\u24d0\u24db\u24d7\u24de\u24e2\u24e3", "localho\u017ft", "loc\u200balhost",
        "loc\u00adalhost", "l\u043ecalhost", "127.0.0.1\u2024example",
        # malformed IPv6, zone ids
        "[::1", "::1]", "::1", "[::1]]", "[[::1]]", "[]", "[:]", "[:::]", "[1::2::3]", "[127.0.0.1]", "[::1%25eth0]",
        "[::1%25lo]", "[::1%lo]", "[fe80::1%25eth0]", "[fe80::1%1]", "[::ffff:127.0.0.1%251]", "[::ffff:0177.0.0.1]",
        "[::ffff:127.1]", "[v1.127001]", "[localhost]", "[::1]evil.example", "evil[::1]", "[::1].example.org",
        # not a host at all
        "", "-evil.example", "evil-.example", "ev*il.example", "evil,example", "{{evil}}", "a" * 64 + ".example",
        ".".join(["abcdefgh"] * 30), "!", "$(id)", "evil;example", "evil'example",
    )
]

TRICKS = [
    # credentials, and what looks like them
    "http://user@127.0.0.1:{port}/", "http://user:password@127.0.0.1:{port}/", "http://:@127.0.0.1:{port}/",
    "http://@127.0.0.1:{port}/", "http://example.org@127.0.0.1:{port}/", "http://example.org:80@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}@example.org/", "http://example.org%40127.0.0.1:{port}/", "http://a@b@127.0.0.1:{port}/",
    # backslashes
    "http://127.0.0.1:{port}\\@example.org/", "http://example.org\\@127.0.0.1:{port}/", "http:\\\\127.0.0.1:{port}/",
    "http:/\\127.0.0.1:{port}/", "http://example.org\\.127.0.0.1:{port}/", "http://127.0.0.1\\:{port}/",
    "http://example.org:{port}/\\..\\a.png", "\\\\127.0.0.1:{port}\\a.png", "http://127.0.0.1:{port}\\",
    # control characters, spaces, line ends
    "http://127.0.0.1:{port}/\r\nHost: example.org", "http://127.0.0.1:{port}/\n", "\thttp://127.0.0.1:{port}/",
    " http://127.0.0.1:{port}/", "http://127.0.0.1:{port}/ ", "http:// 127.0.0.1:{port}/",
    "http://127.0.0.1 :{port}/",
    "http://127.0.0.1:{port}/a b", "ht\ntp://127.0.0.1:{port}/", "http:/\t/127.0.0.1:{port}/",
    "\x00http://127.0.0.1:{port}/",
    "http://127.0.0.1:{port}/\x00", "http://127.0.0.1:{port}/\x7f", "http://127.0.0.1:{port}/\x85",
    "http://127.0.0.1\u00a0:{port}/",
    "http://127.0.0.1:{port}/\u2028", "http://127.0.0.1:{port}/\ud800", "http://127.0.0.1:{port}/\u202e",
    "\ufeffhttp://127.0.0.1:{port}/",
    "http://127.0.0.1:{port}/?a\r\n\r\nDELETE / HTTP/1.1",
    # ports
    "http://127.0.0.1:{port}x/", "http://127.0.0.1:0/", "http://127.0.0.1:65536/", "http://127.0.0.1:-80/",
    "http://127.0.0.1:+80/",
    "http://127.0.0.1:\uff18\uff10/", "http://127.0.0.1:{port}:80/", "http://127.0.0.1: {port}/",
    "http://127.0.0.1:/", "http://127.0.0.1:0x50/",
    "http://127.0.0.1:80,{port}/", "http://127.0.0.1:1000000000000/",
    # slashes
    "http:127.0.0.1:{port}/", "http:/127.0.0.1:{port}/", "http:///127.0.0.1:{port}/", "http:////127.0.0.1:{port}/",
    "//127.0.0.1:{port}/", "/127.0.0.1:{port}/", "127.0.0.1:{port}/", "http//127.0.0.1:{port}/", "http:", "http://",
    "https://", "?", "#", ".",
    # percent signs that begin no escape
    "http://127.0.0.1:{port}/%", "http://127.0.0.1:{port}/%zz", "http://127.0.0.1:{port}/?a=%1",
    # too long
    "http://127.0.0.1:{port}/" + "a" * 9000,
]

SCHEMES = [
    f"{scheme}127.0.0.1:{{port}}/a.png"
    for scheme in (
        "file://", "file:///", "file:/", "gopher://", "dict://", "ftp://", "ftps://", "sftp://", "tftp://", "ldap://",
        "ldaps://", "ws://", "wss://", "smb://", "ssh://", "telnet://", "redis://", "jar:http://", "netdoc://",
        "php://",
        "view-source:http://", "url:http://", "URL:http://", "blob:http://", "javascript://", "about:", "unix://",
        "http+unix://", "httpx://", "httpss://", "xhttp://", "h2c://", "s3://", "gs://", "hdfs://", "mailto:",
        "imap://",
        "http2://", "grpc://", "unix:///", "feed:http://", "data:image/png,http://",
    )
] + ["file:///etc/passwd", "FILE:///etc/passwd", "file://localhost/etc/passwd", "/etc/passwd",
"gopher://x/_FLUSHALL"]

PRIVATE_ADDRESSES = [
    f"http://{host}:{{port}}/"
    for host in (
        "127.0.0.1", "127.0.0.2", "127.1.2.3", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255",
        "100.64.0.1", "100.100.100.200", "100.127.255.254", "168.63.129.16", "169.254.0.1", "169.254.169.254",
        "169.254.170.2", "172.16.0.1", "172.31.255.254", "192.0.0.1", "192.0.0.192", "192.0.2.1", "192.88.99.1",
        "192.168.0.1", "192.168.255.255", "198.18.0.1", "198.19.255.255", "198.51.100.7", "203.0.113.9", "224.0.0.1",
        "239.255.255.250", "240.0.0.1", "255.255.255.255",
        "[::]", "[::1]", "[0:0:0:0:0:0:0:1]", "[0000:0000:0000:0000:0000:0000:0000:0001]", "[::127.0.0.1]",
        "[::7f00:1]",
        "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:127.0.0.1]", "[::FFFF:10.0.0.1]",
        "[::ffff:169.254.169.254]",
        "[::ffff:a9fe:a9fe]", "[::ffff:8.8.8.8]", "[::ffff:0:127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::7f00:1]",
        "[64:ff9b::8.8.8.8]", "[64:ff9b:1::10.0.0.1]", "[2002:7f00:1::]", "[2002:7f00:0001::1]",
        "[2002:a9fe:a9fe::1]",
        "[2002:808:808::1]", "[2001::1]", "[2001:0:4136:e378:8000:63bf:80ff:fffe]", "[2001:2::1]", "[2001:10::1]",
        "[2001:20::1]", "[2001:db8::1]", "[3fff::1]", "[3ffe::1]", "[100::1]", "[5f00::1]", "[fc00::1]",
        "[fd00:ec2::254]",
        "[fd12:3456:789a::1]", "[fe80::1]", "[febf::1]", "[fec0::1]", "[ff02::1]", "[ff0e::1]",
        "[2600::5efe:7f00:1]", "[2600::200:5efe:10.0.0.1]", "[4000::1]",
    )
]

LOCAL_NAMES = [
    f"http://{host}:{{port}}/"
    for host in (
        "localhost", "LOCALHOST", "LocalHost", "foo.localhost", "printer.local", "metadata",
        "metadata.google.internal",
        "db.internal", "router.lan", "nas.home.arpa", "x.onion", "intranet", "wiki.intranet", "localhost.localdomain",
        "redis", "kubernetes", "host.docker.internal", "instance-data",
    )
]

# fmt: on
NAMES_OF_PRIVATE_ADDRESSES = {
    "loopback.example": ["127.0.0.1"],
    "loopback6.example": ["::1"],
    "mixed.example": ["93.184.215.14", "127.0.0.1"],
    "mixed-last.example": ["2606:4700::1111", "93.184.215.14", "::1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "sixtofour.example": ["2002:7f00:1::1"],
    "zone.example": ["fe80::1%lo"],
    "any.example": ["0.0.0.0"],
    "metadata.example": ["169.254.169.254"],
    "ten.example": ["10.0.0.1"],
    "cgnat.example": ["100.64.0.1"],
    "multicast.example": ["224.0.0.1"],
    "broadcast.example": ["255.255.255.255"],
    "127.0.0.1.nip.example": ["127.0.0.1"],
    "xn--lclhost-n0a2m.example": ["127.0.0.1"],
    "nothing.example": [],
    "garbage.example": ["not an address"],
}
